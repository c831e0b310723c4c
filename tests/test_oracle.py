"""Every sampler against diffusers, on the demo model's weights; see scripts/oracle.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHAPES_SOURCE


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # diffusers warns about its own deprecations
def test_every_sampler_matches_diffusers(tmp_path: Path) -> None:
    import oracle

    from sdvino.convert.api import convert

    convert(SHAPES_SOURCE, tmp_path / "fp16", recipe="fp16")
    results = list(oracle.cases(oracle.Oracle(SHAPES_SOURCE, tmp_path / "fp16")))
    missed = [case for case in results if not case.passed]
    assert len(results) >= 150
    assert not missed, oracle.table(missed)
