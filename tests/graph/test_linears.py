"""Linear layers as convolutions: the same numbers, in kernels of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.linears import linears_to_convolutions
from sdvino.runtime.component import Component
from sdvino.settings import DeviceSettings, LinearKernel
from tests.conftest import SHAPES
from tests.graph.test_rewrites import Graph, kinds

TOKENS, WIDTH, OUT = 12, 16, 24
RNG = np.random.default_rng(3)
#: Weights of a fixed seed, in half of their range: exact without VNNI too.
NUMBERS = RNG.integers(-63, 64, (OUT, WIDTH)).astype(np.int8)
SCALES = RNG.uniform(0.01, 0.02, (OUT, 1)).astype(np.float32)
BIAS = RNG.standard_normal((1, 1, OUT)).astype(np.float32)


def rounded(source: Any, levels: int = 256) -> ov.Node:
    low, high = (ops.constant(np.float32(limit)) for limit in (-2.0, 1.984375))
    return ops.fake_quantize(source, low, high, low, high, levels)


def signed() -> ov.Node:
    return ops.multiply(ops.convert(ops.constant(NUMBERS), "f32"), ops.constant(SCALES))


def with_zero_points() -> ov.Node:
    raised = (NUMBERS.astype(np.int16) + 128).astype(np.uint8)
    zero = ops.convert(ops.constant(np.full((OUT, 1), 128, np.uint8)), "f32")
    numbers = ops.subtract(ops.convert(ops.constant(raised), "f32"), zero)
    return ops.multiply(numbers, ops.constant(SCALES))


def in_half_precision() -> ov.Node:
    """As compressed weights are: scaled in f16, then f32."""
    scaled = ops.multiply(
        ops.convert(ops.constant(NUMBERS), "f16"), ops.constant(SCALES.astype(np.float16))
    )
    return ops.convert(scaled, "f32")


def of_one_scale() -> ov.Node:
    return ops.multiply(ops.convert(ops.constant(NUMBERS), "f32"), ops.constant(np.float32(0.015)))


def linear(source: Any, weights: ov.Node) -> ov.Node:
    return ops.matmul(source, weights, False, True)


def model_of(
    make: Callable[[ov.Node], Sequence[ov.Node]], shape: Sequence[int] = (2, TOKENS, WIDTH)
) -> ov.Model:
    states = ops.parameter(list(shape), np.float32, name="states")
    return ov.Model([ops.result(port) for port in make(states)], [states], "linears")


def run(model: ov.Model) -> list[NDArray[Any]]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shape = tuple(model.inputs[0].get_shape())
    states = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    results = compiled({0: states})
    return [np.array(results[port]) for port in compiled.outputs]


def assert_the_same(model: ov.Model, changed: int) -> None:
    expected = run(model.clone())
    assert linears_to_convolutions(model) == changed
    assert kinds(model).count("Convolution") == changed
    for found, right in zip(run(model), expected, strict=True):
        assert found.shape == right.shape
        assert np.abs(found - right).max() <= 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("weights", [signed, with_zero_points, in_half_precision, of_one_scale])
def test_weights_in_every_form(weights: Callable[[], ov.Node]) -> None:
    model = model_of(lambda states: [linear(rounded(states), weights())])
    assert_the_same(model, 1)
    assert "MatMul" not in kinds(model)


def test_what_several_read_is_turned_once() -> None:
    def make(states: ov.Node) -> list[ov.Node]:
        source = rounded(states)
        return [linear(source, signed()) for _ in range(3)]

    model = model_of(make)
    assert_the_same(model, 3)
    assert kinds(model).count("Transpose") == 1 + 3


def test_bias_and_gelu_come_along() -> None:
    def make(states: ov.Node) -> list[ov.Node]:
        return [ops.gelu(ops.add(linear(rounded(states), signed()), ops.constant(BIAS)), "tanh")]

    model = model_of(make)
    assert_the_same(model, 1)
    order = [kind for kind in kinds(model) if kind in ("Convolution", "Add", "Gelu", "Transpose")]
    assert order == ["Transpose", "Convolution", "Add", "Gelu", "Transpose"]


def test_a_residual_is_no_bias() -> None:
    def make(states: ov.Node) -> list[ov.Node]:
        product = linear(rounded(states), signed())
        return [ops.add(product, ops.constant(np.tile(BIAS, (2, TOKENS, 1)))), ops.relu(product)]

    assert_the_same(model_of(make), 1)


def test_what_is_kept_of_a_name() -> None:
    model = model_of(lambda states: [linear(rounded(states), signed())])
    product = next(node for node in model.get_ops() if node.get_type_name() == "MatMul")
    product.set_friendly_name("unet/to_q")
    linears_to_convolutions(model)
    convolution = next(node for node in model.get_ops() if node.get_type_name() == "Convolution")
    assert convolution.get_friendly_name() == "unet/to_q"


def test_weights_lie_where_they_lay() -> None:
    model = ov.Core().read_model(SHAPES / "unet" / "openvino_model.xml")
    model.reshape({"sample": [1, 4, 8, 8], "encoder_hidden_states": [1, 77, 128], "timestep": []})

    def addresses() -> dict[int, int]:
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        eight = [node for node in constants if node.get_element_type() == ov.Type.i8]
        return {node.get_data().ctypes.data: node.get_byte_size() for node in eight}

    before = addresses()
    assert linears_to_convolutions(model) > 20
    assert addresses() == before


FLOATS = RNG.standard_normal((OUT, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: linear(x, signed()), id="inputs in float"),
        pytest.param(lambda x: linear(rounded(x), ops.constant(FLOATS)), id="weights in float"),
        pytest.param(
            lambda x: ops.matmul(rounded(x), ops.transpose(signed(), [1, 0]), False, False),
            id="weights not transposed",
        ),
        pytest.param(
            lambda x: linear(
                rounded(x),
                ops.multiply(
                    ops.convert(ops.constant(NUMBERS), "f32"), ops.constant(np.ones(WIDTH, "f4"))
                ),
            ),
            id="scales by input",
        ),
    ],
)
def test_other_products_stay(make: Callable[[ov.Node], ov.Node]) -> None:
    assert_the_same(model_of(lambda states: [make(states)]), 0)


def test_other_shapes_stay() -> None:
    flat = model_of(lambda states: [linear(rounded(states), signed())], (TOKENS, WIDTH))
    assert linears_to_convolutions(flat) == 0
    open_ended = model_of(lambda states: [linear(rounded(states), signed())], (1, -1, WIDTH))
    assert linears_to_convolutions(open_ended) == 0


@pytest.mark.slow
def test_the_unet_computes_what_it_did() -> None:
    graph = Graph("int8", SHAPES / "unet" / "openvino_model.xml", 128)
    model = graph.read()
    products = kinds(model).count("MatMul")
    changed = linears_to_convolutions(model)
    assert changed > 0.7 * products  # the others are of time, in float
    assert kinds(model).count("MatMul") == products - changed
    assert graph.holds(graph.run(model, graph.inputs)["out_sample"])
    assert linears_to_convolutions(model) == 0  # a second time there is nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["matmul", "convolution"])
def test_a_component_runs_them_as_it_is_told(kernel: LinearKernel) -> None:
    def prepare(model: ov.Model) -> None:
        model.reshape(
            {"sample": [1, 4, 8, 8], "encoder_hidden_states": [1, 77, 128], "timestep": []}
        )

    settings = DeviceSettings(linear_kernel=kernel, cache=False, precision="f32")
    component = Component("unet", SHAPES / "unet" / "openvino_model.xml", settings, prepare=prepare)
    runtime = component.compiled.get_runtime_model()
    eight_bits = [
        node.get_rt_info()["layerType"].astype(str)
        for node in runtime.get_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "Convolution")
        and node.input(0).get_element_type() in (ov.Type.i8, ov.Type.u8)
    ]
    assert ("FullyConnected" in eight_bits) == (kernel == "matmul")
    assert "Convolution" in eight_bits
