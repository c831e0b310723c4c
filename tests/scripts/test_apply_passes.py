"""A recipe's passes to a source, which stays one."""

from __future__ import annotations

import json
from pathlib import Path

import apply_passes
import make_synthetic
import pytest

from sdvino.convert.source import DiffusersFolder
from sdvino.nets.structure import Structure
from sdvino.train.modules import load_component

RECIPE = """
[calibration]
prompts = ['a red circle', 'a green star above a blue ring']
trajectories = 2
strata = 2
samples = 4

[[passes]]
kind = 'prune'
method = 'heads'
share = 0.5

[[passes]]
kind = 'low_rank'
budget = 0.8
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_passes_leave_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, recipe = tmp_path / "tiny", tmp_path / "lean", tmp_path / "lean.toml"
    make_synthetic.make("tiny-sd15", source)
    recipe.write_text(RECIPE, encoding="utf-8")
    told = tmp_path / "told.json"
    arguments = [str(source), str(out), "--recipe", str(recipe)]
    assert apply_passes.main([*arguments, "--json", str(told)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["unet", "unet"]
    structure = Structure.read(DiffusersFolder.open(out).folder("unet"))
    assert structure is not None
    assert structure.heads
    assert structure.ranks
    count = sum(
        parameter.numel() for parameter in load_component(out / "unet", "unet").parameters()
    )
    done = json.loads(told.read_text(encoding="utf-8"))
    assert list(done["cpu_seconds"]) == ["record", "pass 1-prune", "pass 2-low_rank"]
    history = done["passes"]
    assert count == history[-1]["after"]["parameters"] < history[0]["before"]["parameters"]
    for file in source.rglob("*"):
        if file.is_file() and "unet" not in file.parts:
            assert (out / file.relative_to(source)).read_bytes() == file.read_bytes()
    # A second time there is something in the way, and it stays.
    assert apply_passes.main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert Structure.read(out / "unet") == structure


def test_a_recipe_without_passes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).resolve().parents[2] / "models" / "shapes-source"
    assert apply_passes.main([str(source), str(tmp_path / "out"), "--recipe", "int8"]) == 2
    assert "a recipe that has passes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
