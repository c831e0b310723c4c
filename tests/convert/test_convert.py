"""Whole conversions of Stable Diffusion 1.5's layout in miniature, run as people run them."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_synthetic
import numpy as np
import openvino as ov
import pytest

from sdvino.compress.recipes import RECIPES as EVERY_RECIPE
from sdvino.compress.recipes import get_recipe
from sdvino.convert.api import convert
from sdvino.convert.state import work_path
from sdvino.errors import Cancelled, SdvinoError
from sdvino.folder.index import ModelFolder

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
#: global and local are converted by test_local.py.
RECIPES = tuple(name for name in EVERY_RECIPE if name not in ("global", "local"))
PROMPT = "a red circle on a blue background"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in Stable Diffusion 1.5's layout, made by the script."""
    folder = tmp_path_factory.mktemp("synthetic") / "tiny-sd15"
    make_synthetic.make("tiny-sd15", folder)
    return folder


@pytest.fixture(scope="module")
def command(
    synthetic: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that the script wrote, and what it said."""
    target = tmp_path_factory.mktemp("command") / "model"
    words = [sys.executable, str(ROOT / "scripts" / "convert.py"), str(synthetic), str(target)]
    words += ["--recipe", "fp16", "--suggest", "steps=9,guidance=3,scheduler=euler"]
    return target, subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def converted(
    synthetic: Path,
    command: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, ModelFolder]:
    """The same weights by every recipe, each going on from the same exports and inputs."""
    base = tmp_path_factory.mktemp("converted")
    prompts = ("a red circle", "a green star above a blue ring")

    def stop_after_calibration(what: str, share: float) -> None:
        if what.startswith("compress"):
            raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        convert(
            synthetic,
            base / "begun",
            recipe="int8",
            prompts=prompts,
            progress=stop_after_calibration,
        )
    folders = {"fp16": ModelFolder.open(command[0])}
    for recipe in RECIPES:
        if recipe not in folders:
            shutil.copytree(work_path(base / "begun"), work_path(base / recipe))
            folders[recipe] = convert(synthetic, base / recipe, recipe=recipe, prompts=prompts)
    return folders


def compiled(
    folder: ModelFolder, component: str, shapes: dict[str, list[int]] | None = None
) -> ov.CompiledModel:
    model = ov.Core().read_model(folder.components[component].xml)
    if shapes is not None:
        model.reshape(shapes)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return ov.Core().compile_model(model, "CPU", properties)


def inputs_of(component: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "text_encoder": {"input_ids": rng.integers(0, 49_000, (1, 77))},
        "unet": {
            "sample": normal(1, 4, 16, 16),
            "timestep": np.array([601]),
            "encoder_hidden_states": normal(1, 77, 32),
        },
        # About as large as what this random pipeline itself makes, which int8 is calibrated on.
        "vae_decoder": {"latent_sample": 50 * normal(1, 4, 16, 16)},
        "vae_encoder": {"sample": np.clip(0.3 * normal(1, 3, 128, 128), -1, 1)},
    }[component]


def torch_output(source: Path, component: str) -> Any:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    values = {name: torch.from_numpy(value) for name, value in inputs_of(component).items()}
    with torch.no_grad():
        if component == "text_encoder":
            text = CLIPTextModel.from_pretrained(source / component, dtype=torch.float32)
            return text(**values).last_hidden_state.numpy()
        if component == "unet":
            unet = UNet2DConditionModel.from_pretrained(source / component)
            return unet.float()(**values).sample.numpy()
        vae = AutoencoderKL.from_pretrained(source / "vae").float()
        if component == "vae_decoder":
            return vae.decode(values["latent_sample"]).sample.numpy()
        return vae.encode(values["sample"]).latent_dist.parameters.numpy()


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ("fp16", 1e-3),
        ("int8-weights", 0.05),
        ("int8-hybrid", 0.2),
        ("int8", 0.2),
        ("int4-weights", 0.3),
    ],
)
def test_every_component_still_computes_what_torch_does(
    synthetic: Path,
    converted: dict[str, ModelFolder],
    recipe: str,
    component: str,
    error: float,
) -> None:
    expected = torch_output(synthetic, component)
    result = compiled(converted[recipe], component)(inputs_of(component))[0]
    assert np.linalg.norm(result - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_manifest_tells_the_truth_and_no_path(
    converted: dict[str, ModelFolder], recipe: str
) -> None:
    folder = converted[recipe]
    folder.verify()
    assert folder.manifest is not None
    assert folder.manifest.recipe == recipe
    assert folder.manifest.source == "tiny-sd15"
    assert folder.name == "tiny-sd15"
    stored = {name: part.precision for name, part in folder.manifest.components.items()}
    assert set(stored) == set(COMPONENTS)
    assert stored == {name: get_recipe(recipe).treatment(name) for name in COMPONENTS}
    assert stored["unet"] == recipe
    for file in folder.path.rglob("*"):
        if file.is_file():
            assert b"/tmp" not in file.read_bytes()
            assert str(folder.path.parent.name).encode() not in file.read_bytes()


def test_smaller_recipes_are_smaller(converted: dict[str, ModelFolder]) -> None:
    def weights(recipe: str) -> int:
        return sum(part.bin.stat().st_size for part in converted[recipe].components.values())

    assert weights("int4-weights") < weights("int8-weights") < 0.6 * weights("fp16")
    assert weights("int8") < 0.8 * weights("fp16")


def test_int8_quantizes_activations_but_for_the_fragile_layers(
    converted: dict[str, ModelFolder],
) -> None:
    model = ov.Core().read_model(converted["int8"].components["unet"].xml)
    kinds: dict[str, set[str]] = {"quantized": set(), "float": set()}
    for op in model.get_ops():
        if op.get_type_name() == "Convolution":
            fed_by = op.input_value(0).get_node().get_type_name()
            kind = "quantized" if fed_by == "FakeQuantize" else "float"
            kinds[kind].add(op.get_friendly_name())
    assert any("conv1" in name for name in kinds["quantized"])
    for layer in ("conv_in", "conv_out", "conv_shortcut"):
        assert not any(name.endswith(layer) for name in kinds["quantized"])
        assert any(name.endswith(layer) for name in kinds["float"])


@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder"])
def test_int8_is_the_same_with_dynamic_shapes(
    converted: dict[str, ModelFolder], component: str
) -> None:
    """OpenVINO GenAI and optimum-intel compile with dynamic shapes, sdvino with static ones."""
    values = inputs_of(component)
    shapes = {name: list(value.shape) for name, value in values.items()}
    static = compiled(converted["int8"], component, shapes)(values)[0]
    dynamic = compiled(converted["int8"], component)(values)[0]
    assert np.linalg.norm(dynamic - static) <= 0.1 * np.linalg.norm(static)


def test_the_time_embedding_is_exact_in_half_precision(
    synthetic: Path, converted: dict[str, ModelFolder]
) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(synthetic / "unet").float()
    expected = unet.time_proj(torch.tensor([999])).detach().numpy()
    for recipe in RECIPES:
        model = ov.Core().read_model(converted[recipe].components["unet"].xml)
        sine = next(op for op in model.get_ops() if op.get_type_name() == "Sin")
        cut = ov.Model([sine.output(0)], [*model.get_parameters()])
        run = ov.Core().compile_model(cut, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = run({**inputs_of("unet"), "timestep": np.array([999])})[0]
        half = result.shape[-1]
        np.testing.assert_allclose(result[0], expected[0, half:], atol=1e-3)


def test_the_saved_interface_is_optimum_intel_s(converted: dict[str, ModelFolder]) -> None:
    inputs = {
        "text_encoder": {"input_ids": "i64"},
        "unet": {"sample": "f32", "timestep": "i64", "encoder_hidden_states": "f32"},
        "vae_decoder": {"latent_sample": "f32"},
        "vae_encoder": {"sample": "f32"},
    }
    for recipe in RECIPES:
        for component, expected in inputs.items():
            model = ov.Core().read_model(converted[recipe].components[component].xml)
            found = {
                name: port.get_element_type().get_type_name()
                for port in model.inputs
                for name in port.get_names()
            }
            assert found == expected


def test_the_command_says_what_it_made(
    command: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    target, done = command
    assert done.returncode == 0, done.stderr
    assert "unet" in done.stdout
    assert done.stderr == ""
    told = json.loads((target / "sdvino.json").read_text(encoding="utf-8"))["suggested"]
    assert told == {"num_inference_steps": 9, "guidance_scale": 3.0, "scheduler": "euler"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def without_numbers(xml: Path) -> str:
    """The text of an IR without the numbers that OpenVINO gives nameless operations."""
    return re.sub(r"_\d+", "", xml.read_text(encoding="utf-8"))


def assert_same_model(one: Path, other: Path) -> None:
    files = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith("openvino_model.xml"):
            assert without_numbers(one / name) == without_numbers(other / name)
        elif (one / name).is_file() and name != "sdvino.json":  # which holds their checksums
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_killed_at_any_moment_it_continues_to_the_same_model(
    synthetic: Path, converted: dict[str, ModelFolder], tmp_path: Path
) -> None:
    target = tmp_path / "model"
    words = [sys.executable, "-m", "sdvino", "convert", str(synthetic), str(target)]
    words += ["--recipe", "int8-weights", "--no-gate"]
    rng = random.Random(7)
    said = []
    for _ in range(8):
        running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, stderr = running.communicate(timeout=rng.uniform(0.2, 8.0))
        except subprocess.TimeoutExpired:
            running.kill()
            _, stderr = running.communicate()
        said.append(stderr.decode())
        if target.exists():
            ModelFolder.open(target).verify()
            break
        assert {path.name for path in tmp_path.iterdir()} <= {".model.sdvino-partial"}
    if not target.exists():
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not any("Traceback" in text for text in said), said
    ModelFolder.open(target).verify()
    assert_same_model(target, converted["int8-weights"].path)


def test_another_request_shares_what_is_the_same_and_ctrl_c_says_how_to_go_on(
    synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "model"

    def stop_after_export(what: str, share: float) -> None:
        if what.startswith("compress"):
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match="run the same command again"):
        convert(synthetic, target, recipe="int8-weights", progress=stop_after_export)
    assert [path.name for path in tmp_path.iterdir()] == [".model.sdvino-partial"]
    done: list[str] = []
    fp16 = convert(synthetic, target, recipe="fp16", progress=lambda what, _: done.append(what))
    assert "Continuing" in caplog.text
    assert not any(what.startswith("export") for what in done)
    assert fp16.manifest is not None
    assert fp16.manifest.recipe == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_cannot_be_exported_leave_nothing(source: Path, tmp_path: Path) -> None:
    """A folder that passes every check and holds no such model: the worker's error is one."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SdvinoError) as caught:
        convert(source, tmp_path / "model", recipe="fp16")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
