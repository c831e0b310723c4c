"""Global and local quantization from float weights to a folder, by a recipe in TOML."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from sdvino.cli.main import main
from sdvino.folder.index import ModelFolder
from tests.conftest import SHAPES
from tests.tiny_folder import WIDTH, make_tiny_folder

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")
RECIPE = """
[text_encoder]
mode = "global"
activations = false
[unet]
mode = "local"
budget = {budget}
[calibration]
prompts = ["a red circle"]
trajectories = 1
strata = 1
samples = 2
"""


@pytest.mark.slow
def test_a_recipe_with_both_becomes_a_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = make_tiny_folder(tmp_path / "tiny"), tmp_path / "model"
    shutil.rmtree(source / "tokenizer")
    shutil.copytree(SHAPES / "tokenizer", source / "tokenizer")
    file = tmp_path / "mine.toml"
    words = ["convert", str(source), str(target), "--recipe", str(file), "--no-gate"]
    words += ["--target", "avx2-vnni"]
    # What nothing can meet is said, and the next budget goes on from the finished steps.
    file.write_text(RECIPE.format(budget=0.2), encoding="utf-8")
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "The budget of unet is 0.2, and the least that its layers can take is 0.28" in said
    assert not target.exists()
    file.write_text(RECIPE.format(budget=0.3), encoding="utf-8")
    assert main(words) == 0
    out, said = capfd.readouterr()
    folder = ModelFolder.open(target)
    folder.verify()
    assert folder.manifest is not None
    stored = {name: entry.precision for name, entry in folder.manifest.components.items()}
    assert stored == {"text_encoder": "global", "unet": "local", "vae_decoder": "fp16"}
    # The choices: kept, drawn and printed.
    plan = json.loads((target / "unet" / "quantization.json").read_text(encoding="utf-8"))
    (layer,) = plan["layers"]
    assert plan["bytes"] <= plan["budget"]
    assert (plan["measured_on"], layer["coding"]["bits"]) == (2, 4)
    assert layer["effect"] > 0
    assert (target / "unet" / "quantization.png").is_file()
    assert "unet: " in said
    assert "4 bits, channel, asymmetric" in said
    # Activations are in float, so it is made for no kind of machine.
    assert folder.manifest.target is None
    assert "made for" not in out
    # And both still compute about what they did.
    inputs = {
        "text_encoder": {"input_ids": np.arange(77, dtype=np.int64)[None]},
        "unet": {
            "sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32),
            "timestep": np.array([601]),
            "encoder_hidden_states": np.ones((1, 77, WIDTH), np.float32),
        },
    }
    for name, given in inputs.items():
        results = [
            ov.Core().compile_model(path / name / "openvino_model.xml", "CPU")(given)[0]
            for path in (source, target)
        ]
        assert 0 < np.linalg.norm(results[1] - results[0]) < 0.2 * np.linalg.norm(results[0])
