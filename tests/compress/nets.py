"""Networks in miniature, named as optimum-intel names a UNet's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

Array = np.ndarray[Any, np.dtype[np.float32]]
CHANNELS = 16
SIDE = 16


def convolution(x: Any, name: str, rng: np.random.Generator) -> Any:
    weights = 0.1 * rng.standard_normal((CHANNELS, CHANNELS, 3, 3), dtype=np.float32)
    bias = ops.constant(rng.standard_normal((1, CHANNELS, 1, 1), dtype=np.float32))
    result = ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    result.set_friendly_name(f"__module.{name}/aten::_convolution/Convolution")
    return ops.add(result, bias)


def linear(x: Any, name: str, rng: np.random.Generator, width: int = 64) -> Any:
    inside = x.get_output_partial_shape(0)[2].get_length()
    weights = 0.2 * rng.standard_normal((width, inside), dtype=np.float32)
    result = ops.matmul(x, ops.constant(weights), False, True)
    result.set_friendly_name(f"__module.{name}/aten::linear/MatMul")
    result = ops.add(result, ops.constant(np.zeros((1, 1, width), np.float32)))
    result.set_friendly_name(f"__module.{name}/aten::linear/Add")
    return result


def residual_network() -> ov.Model:
    """A sampler, then a block without conv_shortcut: what a VAE has after each of its levels."""
    rng = np.random.default_rng(0)
    x = parameter([-1, CHANNELS, -1, -1], "sample")
    h = residual = convolution(ops.relu(x), "upsamplers.0.conv", rng)
    for name in ("resnets.0.conv1", "resnets.0.conv2"):
        h = convolution(ops.swish(normalize(h)), name, rng)
    return ov.Model([ops.add(residual, h)], [x], "block")


def attention_network() -> ov.Model:
    """conv_in, a block, self-attention with its linears, conv_out: a UNet of one level."""
    rng = np.random.default_rng(0)
    x = parameter([-1, CHANNELS, -1, -1], "sample")
    h = convolution(x, "conv_in", rng)
    h = convolution(ops.swish(normalize(h)), "mid_block.resnets.0.conv1", rng)
    shape = ops.shape_of(h, ov.Type.i64)
    flat = ops.reshape(normalize(h), np.array([0, CHANNELS, -1], np.int64), True)
    tokens = ops.transpose(flat, np.array([0, 2, 1], np.int64))
    q, k, v = (linear(tokens, f"attn1.to_{name}", rng) for name in "qkv")
    attention = ops.scaled_dot_product_attention(q, k, v)
    attention.set_friendly_name("__module.attn1/aten::scaled_dot_product_attention/SDPA")
    y = linear(attention, "attn1.to_out.0", rng, CHANNELS)
    y = ops.reshape(ops.transpose(y, np.array([0, 2, 1], np.int64)), shape, False)
    return ov.Model([convolution(y, "conv_out", rng)], [x], "unet")


def parameter(shape: list[int], name: str) -> Any:
    x = ops.parameter(shape, ov.Type.f32, name=name)
    x.output(0).get_tensor().set_names({name})
    return x


def normalize(x: Any) -> Any:
    one, zero = ops.constant(np.ones(CHANNELS, "f4")), ops.constant(np.zeros(CHANNELS, "f4"))
    return ops.group_normalization(x, one, zero, 4, 1e-6)


def samples(count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    shape = (1, CHANNELS, SIDE, SIDE)
    return [{"sample": rng.standard_normal(shape, dtype=np.float32)} for _ in range(count)]


def run(model: ov.Model, sample: dict[str, Array], *, exact: bool = False) -> Array:
    """The model's output. ``exact``: without low-precision kernels, which overflow before VNNI."""
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    if exact:
        properties["LP_TRANSFORMS_MODE"] = "NO"
    result: Array = ov.Core().compile_model(model, "CPU", properties)(sample)[0]
    return result


def error(
    model: ov.Model, expected: Array, sample: dict[str, Array], *, exact: bool = False
) -> float:
    """Relative error of the model's output."""
    found = run(model, sample, exact=exact)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def constants(model: ov.Model) -> set[str]:
    """The types of the constants that hold weights."""
    return {
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and op.get_output_size() and _size(op) >= 256
    }


def _size(op: ov.Node) -> int:
    return int(np.prod(op.output(0).get_shape()))
