"""A recipe of passes, to a folder: prune, low rank, quantize, interrupted once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import make_synthetic
import numpy as np
import openvino as ov
import pytest

from sdvino.cli.convert import summary
from sdvino.convert.api import _decide, convert, look_ahead, make_request
from sdvino.convert.conversion import origin_of, steps_of
from sdvino.convert.request import WorkPlan
from sdvino.convert.state import work_path
from sdvino.convert.worker import run_step
from sdvino.errors import Cancelled, RequestError
from sdvino.folder.index import ModelFolder
from sdvino.folder.manifest import Manifest
from sdvino.train.calls import call
from sdvino.train.modules import load_component
from tests.tiny_folder import make_tiny_folder

RECIPE = """
name = 'lean'
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
kind = 'prune'
component = 'text_encoder'
share = 0.3
keep = ['embedding']

[[passes]]
kind = 'low_rank'
budget = 0.7

[[passes]]
kind = 'quantize'
scheme = 'int8-weights'
"""
PASSES = ["pass 1-prune", "pass 2-prune", "pass 3-low_rank"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "lean.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_interrupted_after_a_pass_it_goes_on_to_the_same_model(
    tmp_path: Path, recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "tiny", tmp_path / "model"
    make_synthetic.make("tiny-sd15", source)
    work, kept = work_path(target), tmp_path / "kept"

    def stop(what: str, share: float) -> None:
        if what == PASSES[1] and share > 0:
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match="run the same command again"):
        convert(source, target, recipe=recipe, progress=stop)
    assert sorted(path.name for path in (work / "passes").iterdir())[0] == "1-prune"
    done: list[str] = []

    def keep(what: str, share: float) -> None:
        if what.startswith("export") and not kept.exists():
            shutil.copytree(work, kept)
        done.append(what)

    folder = convert(source, target, recipe=recipe, progress=keep)
    assert "Continuing" in caplog.text
    assert PASSES[0] not in done
    assert PASSES[2] in done
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    again = tmp_path / "again"  # without an interruption
    again.mkdir()
    plan = WorkPlan.read(kept)
    for name in ("inputs", "passes", "tmp"):
        (again / name).mkdir()
    for step in ("record", *PASSES):
        run_step(plan, again, step, lambda share: None)
    for file in sorted((again / "passes").rglob("*")):
        if file.is_file():
            other = kept / file.relative_to(again)
            assert file.read_bytes() == other.read_bytes(), file.name
    check_history(folder, again)
    check_unet(folder, again / "passes" / "3-low_rank" / "unet", kept / "inputs" / "unet.npz")


def check_history(folder: ModelFolder, again: Path) -> None:
    manifest = Manifest.read(folder.path)
    assert manifest is not None
    told = [dict(entry) for entry in manifest.passes]
    files = [again / "passes" / name.partition(" ")[2] / "history.json" for name in PASSES]
    assert told == [json.loads(file.read_text(encoding="utf-8")) for file in files]
    heads, zeros, thin = told
    assert heads["after"]["parameters"] < heads["before"]["parameters"]
    assert zeros["figures"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert thin["before"] == heads["after"]
    assert thin["after"]["parameters"] <= 0.7 * thin["before"]["parameters"]
    assert 0 < thin["output_error"] < 1
    said = summary(folder.path)
    assert "unet: low_rank budget 70.0%" in said
    assert "neither time nor memory" in said
    report = (folder.path / "passes.md").read_text(encoding="utf-8")
    assert "| `mid_block.attentions.0.transformer_blocks.0.attn1` |" in report
    assert manifest.components["unet"].precision == "int8-weights"


def check_unet(folder: ModelFolder, passed: Path, inputs: Path) -> None:
    """What runs is what the passes left, in 8 bits."""
    with np.load(inputs) as arrays:
        names = ("sample", "timestep", "encoder_hidden_states")
        sample: dict[str, Any] = {name: arrays[f"0/{name}"] for name in names}
    expected = call(load_component(passed, "unet"), sample).numpy()
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(folder.components["unet"].xml, "CPU", properties)
    found = compiled(sample)[0]
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


def test_a_dry_run_tells_the_passes(source: Path, tmp_path: Path, recipe: Path) -> None:
    outlook = look_ahead(make_request(source, recipe=recipe), tmp_path / "model")
    steps = [needs.step.name for needs in outlook.steps]
    assert steps[:5] == ["metadata", "record", *PASSES]
    assert [needs.what for needs in outlook.steps[2:5]] == [
        "prune heads 50% unet",
        "prune magnitude 30% text_encoder",
        "low_rank budget 70.0% unet",
    ]


def test_other_passes_are_another_export_and_those_before_stay(
    source: Path, tmp_path: Path, recipe: Path
) -> None:
    def keys(text: str) -> dict[str, str]:
        path = tmp_path / "other.toml"
        path.write_text(text, encoding="utf-8")
        request = make_request(source, recipe=path)
        opened = request.open_source(tmp_path)
        plan, _ = _decide(request, request.resolve_recipe(), opened)
        return {step.name: key for step, key in steps_of(opened, plan, origin_of(plan))}

    one, other = keys(RECIPE), keys(RECIPE.replace("budget = 0.7", "budget = 0.6"))
    same = {name for name in one if one[name] == other.get(name)}
    assert {"metadata", "record", "pass 1-prune", "pass 2-prune", "export text_encoder"} <= same
    assert not same & {"pass 3-low_rank", "export unet", "compress unet"}
    plain = keys("[unet]\nmode = 'int8-weights'\n")
    assert plain["export vae_decoder"] == one["export vae_decoder"]
    assert plain["export unet"] != one["export unet"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind = 'prune'\nshare = 0.1\ncomponent = 'text_encoder_2'", "has no text_encoder_2"),
        ("kind = 'prune'\nshare = 2", "give a share from 0 to below 1"),
    ],
)
def test_passes_that_do_not_fit_leave_nothing(
    source: Path, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"[[passes]]\n{text}\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RequestError, match=said) as caught:
        convert(source, tmp_path / "model", recipe=path)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_openvino_model_bears_no_passes(tmp_path: Path, recipe: Path) -> None:
    folder = make_tiny_folder(tmp_path / "tiny")
    with pytest.raises(RequestError, match="weights are fixed"):
        look_ahead(make_request(folder, recipe=recipe), tmp_path / "model")
