"""Attention in bf16 beside 8-bit layers: what is rewritten, and how little it changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.similarity import relative_error
from sdvino.graph.attention import attention_to_bf16
from sdvino.runtime.rewrites import rewrite_for
from sdvino.settings import AttentionPrecision, DeviceSettings
from tests.conftest import SHAPES
from tests.graph.test_rewrites import Graph, kinds
from tests.runtime.test_properties import ZEN4

TOKENS, HEADS, WIDTH = 24, 2, 8


def model_of(*, eight_bits: bool, masked: bool = False, half: bool = False) -> ov.Model:
    """Return self-attention over states [1, tokens, heads * width], perhaps rounded to 8 bits."""
    states = ops.parameter([1, TOKENS, HEADS * WIDTH], np.float32, name="states")
    source: Any = states
    if eight_bits:
        source = ops.fake_quantize(states, *map(np.float32, (-4, 4, -4, 4)), 256)
    heads = ops.transpose(ops.reshape(source, [1, TOKENS, HEADS, WIDTH], False), [0, 2, 1, 3])
    if half:
        heads = ops.convert(heads, "f16")
    mask = ops.constant(np.triu(np.full((TOKENS, TOKENS), -1e4, np.float32), 1))
    attended = ops.scaled_dot_product_attention(heads, heads, heads, *([mask] if masked else []))
    attended.set_friendly_name("attention")
    return ov.Model([ops.result(attended)], [states], "attention")


def run(model: ov.Model) -> NDArray[np.float32]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    states = np.random.default_rng(0).standard_normal((1, TOKENS, HEADS * WIDTH))
    result: NDArray[np.float32] = np.array(compiled(states.astype(np.float32))[0])
    return result


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_in_bf16_and_what_surrounds_it_in_f32(masked: bool) -> None:
    model = model_of(eight_bits=True, masked=masked)
    before = run(model)
    assert attention_to_bf16(model) == 1
    (node,) = (n for n in model.get_ordered_ops() if n.get_friendly_name() == "attention")
    assert {port.get_element_type() for port in node.input_values()} == {ov.Type.bf16}
    assert model.output(0).get_element_type() == ov.Type.f32
    # bf16 keeps eight bits of each number, whether the device computes in it or not.
    assert relative_error(run(model), before) < 2**-7
    assert attention_to_bf16(model) == 0  # a second time there is nothing to do


def test_a_model_without_8_bit_activations_stays_exact() -> None:
    model = model_of(eight_bits=False)
    before = kinds(model)
    assert attention_to_bf16(model) == 0
    assert kinds(model) == before


def test_attention_that_is_narrow_already_stays() -> None:
    assert attention_to_bf16(model_of(eight_bits=True, half=True)) == 0


@pytest.mark.slow
def test_the_unet_is_no_further_from_the_float_model_than_before() -> None:
    graph = Graph("int8", SHAPES / "unet" / "openvino_model.xml", 128)
    model = graph.read()
    assert attention_to_bf16(model) == kinds(model).count("ScaledDotProductAttention") > 0
    assert graph.holds(graph.run(model, graph.inputs)["out_sample"])


@pytest.mark.parametrize(
    ("component", "asked", "expected"),
    [("unet", None, True), ("unet", "f32", False), ("vae_decoder", None, False)],
)
def test_only_a_unet_on_a_processor_that_has_bf16_is_rewritten(
    component: str, asked: AttentionPrecision | None, expected: bool
) -> None:
    model = model_of(eight_bits=True)
    settings = DeviceSettings(attention_precision=asked)
    rewrite_for(model, component, settings, "f32", {"CPU": ZEN4})
    assert (kinds(model).count("Convert") > 0) == expected
