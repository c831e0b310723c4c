"""What `sdvino convert` says before any heavy work: the dry run, and wrong requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdvino.cli.main import main
from tests.conftest import SHAPES_SOURCE


def test_a_dry_run_shows_the_steps_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "model"
    assert main(["convert", str(SHAPES_SOURCE), str(target), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in ("export unet", "calibrate", "compress vae_decoder", "int8", "memory:", "disk:"):
        assert word in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_knows_no_calibration_without_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(SHAPES_SOURCE), str(tmp_path / "model"), "--dry-run"]
    assert main([*words, "--recipe", "int8-weights"]) == 0
    assert "calibrate" not in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["SOURCE", "OUT/model", "--recipe", "int9"], "int9"),
        (["SOURCE", "OUT/model", "--component", "unet=int9"], "int9"),
        (["SOURCE", "OUT/model", "--component", "unet"], "NAME=PRECISION"),
        (["SOURCE", "OUT/model", "--suggest", "steps=no"], "steps"),
        (["SOURCE", "OUT/model", "--prompts", "OUT/none.txt"], "none.txt"),
        (["OUT/none", "OUT/model"], "none"),
        (["SOURCE", "SOURCE"], "source"),
        (["SOURCE", "FILE"], "not a folder"),
        (["SOURCE", "FILE/model"], "choose another"),
    ],
)
def test_a_wrong_request_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
    dry_run: list[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = tmp_path / "file"
    file.touch()
    places = {"SOURCE": str(SHAPES_SOURCE), "OUT": str(out), "FILE": str(file)}
    for name, place in places.items():
        arguments = [text.replace(name, place) for text in arguments]
    status = main(["convert", *arguments, *dry_run])
    shown = capsys.readouterr()
    assert status == 2, shown.err
    assert word in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""
    assert list(out.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [file, out]
    assert not list(SHAPES_SOURCE.parent.glob(".*.sdvino-partial"))
