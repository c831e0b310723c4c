"""Converting, calibrating and judging do without torch: its libraries cannot be imported here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdvino.compress.recipe_file import to_toml
from sdvino.compress.recipes import CalibrationRecipe, get_recipe

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "models" / "shapes-source"
#: Python imports it at every start, in worker processes too.
BLOCKER = """
import importlib.util, sys
gone = {names}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in gone else find(name, *more)
sys.modules.update(dict.fromkeys(gone))
"""
TRAINING = ("torch", "torchvision", "diffusers", "transformers", "optimum", "accelerate", "peft")
#: What the wheel alone does not bring.
CONVERTING = ("nncf", "matplotlib", "openvino_tokenizers")
FEW = CalibrationRecipe(trajectories=2, strata=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "gone"),
    [
        ("fp16", (*TRAINING, *CONVERTING)),
        ("fp16", TRAINING),
        ("int8-weights", TRAINING),
        ("few", TRAINING),
    ],
)
def test_every_kind_of_recipe(tmp_path: Path, recipe: str, gone: tuple[str, ...]) -> None:
    (tmp_path / "blocked").mkdir()
    blocker = BLOCKER.replace("{names}", repr(gone))
    (tmp_path / "blocked" / "sitecustomize.py").write_text(blocker)
    few = replace(get_recipe("int8"), name="few", calibration=FEW)
    (tmp_path / "few.toml").write_text(to_toml(few))
    folder = tmp_path / "model"
    asked = str(tmp_path / "few.toml") if recipe == "few" else recipe
    gate = ["--gate-minutes", "0.5"] if recipe == "few" else ["--no-gate"]
    paths = os.pathsep.join([str(tmp_path / "blocked"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "sdvino", "convert", SOURCE, folder, "--recipe", asked, *gate],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "sdvino.json").read_text())
    # A recipe of few samples may not pass.
    assert manifest["recipe"] == recipe or recipe == "few"
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    graph = folder / "tokenizer" / "openvino_tokenizer.xml"
    assert graph.is_file() == ("openvino_tokenizers" not in gone)
    assert recipe != "few" or "quality" in manifest
