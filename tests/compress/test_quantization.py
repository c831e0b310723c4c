from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.quantization import nodes_with_weights, quantize, residual_sources
from sdvino.compress.weights import compress_weights

Array = np.ndarray[Any, np.dtype[np.float32]]
CHANNELS = 16


def convolution(x: Any, name: str, rng: np.random.Generator) -> Any:
    weights = 0.1 * rng.standard_normal((CHANNELS, CHANNELS, 3, 3), dtype=np.float32)
    bias = ops.constant(rng.standard_normal((1, CHANNELS, 1, 1), dtype=np.float32))
    result = ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    result.set_friendly_name(f"__module.{name}/aten::_convolution/Convolution")
    return ops.add(result, bias)


def residual_network() -> ov.Model:
    """A sampler, then a block without conv_shortcut: what a VAE has after each of its levels."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, CHANNELS, -1, -1], ov.Type.f32, name="sample")
    x.output(0).get_tensor().set_names({"sample"})
    h = residual = convolution(ops.relu(x), "upsamplers.0.conv", rng)
    one, zero = ops.constant(np.ones(CHANNELS, "f4")), ops.constant(np.zeros(CHANNELS, "f4"))
    for name in ("resnets.0.conv1", "resnets.0.conv2"):
        h = convolution(ops.swish(ops.group_normalization(h, one, zero, 4, 1e-6)), name, rng)
    return ov.Model([ops.add(residual, h)], [x], "block")


def names(model: ov.Model) -> list[str]:
    return [name.split("/")[0].removeprefix("__module.") for name in nodes_with_weights(model)]


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    shape = (1, CHANNELS, 16, 16)
    return [{"sample": rng.standard_normal(shape, dtype=np.float32)} for _ in range(4)]


def run(model: ov.Model, sample: dict[str, Array]) -> Array:
    result: Array = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        sample
    )[0]
    return result


def test_layers_are_found_in_graph_order() -> None:
    assert names(residual_network()) == ["upsamplers.0.conv", "resnets.0.conv1", "resnets.0.conv2"]


def test_the_convolution_that_a_block_adds_to_is_found() -> None:
    assert residual_sources(residual_network()) == [
        "__module.upsamplers.0.conv/aten::_convolution/Convolution"
    ]


@pytest.mark.parametrize("dynamic", [True, False])
def test_quantized_blocks_keep_their_residual(
    samples: list[dict[str, Array]], dynamic: bool
) -> None:
    expected = run(residual_network(), samples[0])
    shares: list[float] = []
    model = quantize("unet", residual_network(), samples, progress=shares.append)
    if not dynamic:
        model.reshape([1, CHANNELS, 16, 16])
    result = run(model, samples[0])
    assert np.linalg.norm(result - expected) < 0.03 * np.linalg.norm(expected)
    assert any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_weights_alone_need_no_samples(samples: list[dict[str, Array]]) -> None:
    expected = run(residual_network(), samples[0])
    model = compress_weights(residual_network())
    kinds = {op.get_element_type().get_type_name() for op in model.get_ops()}
    assert "u8" in kinds
    assert not any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    assert np.linalg.norm(run(model, samples[0]) - expected) < 0.02 * np.linalg.norm(expected)
