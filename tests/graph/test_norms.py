"""Group norms as means over channels: the same numbers, in the convolutions' own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.norms import group_norms_to_channels
from sdvino.runtime.component import Component
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.topology import cpu_class
from sdvino.settings import DeviceSettings
from tests.conftest import SHAPES, SHAPES_SOURCE
from tests.graph.exported import Compiled, some_latents, xml
from tests.graph.test_rewrites import NO_FURTHER, kinds

GROUPS, CHANNELS, EPSILON = 4, 12, 1e-6
RNG = np.random.default_rng(5)
WEIGHT = RNG.uniform(0.5, 2.0, CHANNELS).astype(np.float32)
BIAS = RNG.standard_normal(CHANNELS).astype(np.float32)


def model_of(shape: Sequence[int], element: ov.Type = ov.Type.f32) -> ov.Model:
    source = ops.parameter(list(shape), element, name="x")
    dtype = element.to_dtype()
    norm = ops.group_normalization(
        source,
        ops.constant(WEIGHT.astype(dtype)),
        ops.constant(BIAS.astype(dtype)),
        GROUPS,
        EPSILON,
    )
    norm.set_friendly_name("norm1")
    norm.output(0).set_names({"y"})
    return ov.Model([ops.result(norm)], [source], "norm")


def run(model: ov.Model, values: NDArray[Any]) -> NDArray[Any]:
    return np.array(Compiled(model).infer({0: values})["y"])


@pytest.mark.parametrize("sides", [(5,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("middle", [0.0, 300.0])
def test_it_is_torch_s_group_norm(sides: tuple[int, ...], middle: float) -> None:
    values = (RNG.standard_normal((2, CHANNELS, *sides)) + middle).astype(np.float32)
    model = model_of(values.shape)
    assert group_norms_to_channels(model) == 1
    assert "GroupNormalization" not in kinds(model)
    exact = torch.nn.functional.group_norm(
        torch.from_numpy(values.astype(np.float64)),
        GROUPS,
        torch.from_numpy(WEIGHT.astype(np.float64)),
        torch.from_numpy(BIAS.astype(np.float64)),
        EPSILON,
    ).numpy()
    # Squares less the square of a mean of 300 would have lost five digits of seven.
    assert np.abs(run(model, values) - exact).max() <= 1e-5 * max(1.0, middle / 10)


def test_what_is_kept_of_a_name() -> None:
    model = model_of((1, CHANNELS, 4, 4))
    group_norms_to_channels(model)
    last = model.get_results()[0].input_value(0)
    assert last.get_node().get_friendly_name() == "norm1"
    assert last.get_names() == {"y"}


@pytest.mark.parametrize(
    ("shape", "element", "largest"),
    [
        ((1, CHANNELS, 4, 4), ov.Type.f32, CHANNELS * 16 - 1),
        ((1, CHANNELS, -1, 4), ov.Type.f32, 1 << 20),
        ((1, CHANNELS, 4, 4), ov.Type.f16, 1 << 20),
        ((3, CHANNELS), ov.Type.f32, 1 << 20),
    ],
    ids=["too large", "open shape", "half precision", "without pixels"],
)
def test_others_stay(shape: tuple[int, ...], element: ov.Type, largest: int) -> None:
    model = model_of(shape, element)
    assert group_norms_to_channels(model, largest) == 0
    assert "GroupNormalization" in kinds(model)


def decode_twice(path: Path, latents: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Return what the decoder at ``path`` makes of ``latents`` before and after the rewrite."""
    model = ov.Core().read_model(path)
    model.reshape({"latent_sample": list(latents.shape)})
    norms = kinds(model).count("GroupNormalization")
    before = np.array(Compiled(model).infer({"latent_sample": latents})["sample"])
    assert group_norms_to_channels(model) == norms > 10
    after = np.array(Compiled(model).infer({"latent_sample": latents})["sample"])
    assert group_norms_to_channels(model) == 0  # a second time there is nothing to do
    return [before, after]


@pytest.mark.slow
def test_a_decoder_in_float_computes_what_it_did() -> None:
    before, after = decode_twice(xml("vae_decoder"), some_latents(1, 4, 8, 8))
    assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)


@pytest.mark.slow
def test_a_decoder_in_8_bits_is_as_near_to_float_as_it_was() -> None:
    latents = some_latents(1, 4, 8, 8)
    with torch.no_grad():
        autoencoder = AutoencoderKL.from_pretrained(SHAPES_SOURCE / "vae")
        exact = autoencoder.decode(torch.from_numpy(latents)).sample.numpy()
    before, after = decode_twice(SHAPES / "vae_decoder" / "openvino_model.xml", latents)
    errors = [np.linalg.norm(found - exact) for found in (before, after)]
    assert errors[1] <= NO_FURTHER * errors[0]
    assert errors[1] <= 0.1 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("vae_decoder", False), ("unet", True)])
def test_a_component_does_it_in_the_autoencoder(name: str, left: bool) -> None:
    shapes = {
        "vae_decoder": {"latent_sample": [1, 4, 8, 8]},
        "unet": {"sample": [1, 4, 8, 8], "encoder_hidden_states": [1, 77, 128], "timestep": []},
    }

    def prepare(model: ov.Model) -> None:
        model.reshape(shapes[name])

    settings = DeviceSettings(cache=False, precision="f32")
    component = Component(name, SHAPES / name / "openvino_model.xml", settings, prepare=prepare)
    cpu = device_facts(shared_core(), "CPU").cpu
    assert cpu is not None
    kept = left or cpu_class(cpu.isa) != "avx2"
    runtime = component.compiled.get_runtime_model()
    layers = [node.get_rt_info()["layerType"].astype(str) for node in runtime.get_ops()]
    assert ("Reduce" in layers) != kept
