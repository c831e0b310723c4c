"""What is saved of a network is the same, whatever the process did before."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdvino.convert.export import IR_NAME, export_component
from sdvino.convert.source import DiffusersFolder
from tests.conftest import SHAPES_SOURCE


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "tiny_vae"])
def test_a_file_does_not_depend_on_what_was_made_before(tmp_path: Path, component: str) -> None:
    source = DiffusersFolder.open(SHAPES_SOURCE)
    for name in ("first", "second"):  # OpenVINO counts on from the one to the other
        export_component(source, component, tmp_path / name, "sdvino")
    first, second = (tmp_path / name / IR_NAME for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".bin").read_bytes() == second.with_suffix(".bin").read_bytes()
