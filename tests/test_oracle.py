"""Every sampler against diffusers, on the demo model's weights; see scripts/oracle.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHAPES_SOURCE


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # diffusers warns about its own deprecations
def test_every_sampler_matches_diffusers(tmp_path: Path) -> None:
    import oracle
    from oracle_schedulers import COMBINATIONS

    from sdvino.convert.api import convert

    convert(SHAPES_SOURCE, tmp_path / "fp16", recipe="fp16")
    both = oracle.Oracle(SHAPES_SOURCE, tmp_path / "fp16")
    results = list(oracle.cases(both, steps=(4,)))
    assert len(results) >= 50
    # The script runs 8 and 20 steps of every grid, too: that is five times as long.
    one_of_each = {pair.sampler: pair for pair in reversed(COMBINATIONS)}
    results += oracle.cases(both, steps=(8, 20), combinations=list(one_of_each.values()))
    missed = [case for case in results if not case.passed]
    assert not missed, "\n".join(map(str, missed))
