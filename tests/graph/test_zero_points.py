"""Zero points of activations as part of the biases: the same numbers from plainer kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.linears import linears_to_convolutions
from sdvino.graph.zero_points import zero_points_to_biases
from tests.conftest import SHAPES
from tests.graph.exported import some_latents
from tests.graph.test_rewrites import Graph, kinds

CHANNELS, OUT, SIDE = 8, 12, 6
STEP, ZERO = 0.02, 14
Make = Callable[[ov.Node], Sequence[Any]]


def rounded(source: Any, zero: int = ZERO, step: float = STEP, levels: int = 256) -> ov.Node:
    low, high = np.float32(-zero * step), np.float32((255 - zero) * step)
    return ops.fake_quantize(source, low, high, low, high, levels)


def numbers(side: int = 3, seed: int = 0) -> NDArray[np.int8]:
    """Weights in half of their range: exact without VNNI too."""
    rng = np.random.default_rng(seed)
    return rng.integers(-63, 64, (OUT, CHANNELS, side, side)).astype(np.int8)


def weights(side: int = 3, seed: int = 0, scales: Any = None) -> ov.Node:
    if scales is None:
        scales = np.random.default_rng(seed).uniform(0.01, 0.02, (OUT, 1, 1, 1)).astype(np.float32)
    converted = ops.convert(ops.constant(numbers(side, seed)), "f32")
    return ops.multiply(converted, ops.constant(scales))


def convolution(
    source: Any,
    kernel: ov.Node | None = None,
    *,
    stride: int = 1,
    before: Sequence[int] = (1, 1),
    behind: Sequence[int] = (1, 1),
) -> ov.Node:
    kernel = weights() if kernel is None else kernel
    return ops.convolution(source, kernel, [stride] * 2, list(before), list(behind), [1, 1])


def biased(node: ov.Node, half: bool = False) -> ov.Node:
    bias = np.random.default_rng(7).standard_normal((1, OUT, 1, 1)).astype(np.float32)
    constant: Any = ops.constant(bias.astype(np.float16) if half else bias)
    return ops.add(node, ops.convert(constant, "f32") if half else constant)


def model_of(make: Make) -> ov.Model:
    x = ops.parameter([2, CHANNELS, SIDE, SIDE], np.float32, name="x")
    return ov.Model([ops.result(port) for port in make(x)], [x], "zeros")


def run(model: ov.Model) -> list[NDArray[Any]]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled({0: 2 * some_latents(2, CHANNELS, SIDE, SIDE, seed=5)})
    return [np.array(results[port]) for port in compiled.outputs]


def assert_the_same(make: Make, changed: int) -> ov.Model:
    model = model_of(make)
    expected = run(model.clone())
    assert zero_points_to_biases(model) == changed
    for found, right in zip(run(model), expected, strict=True):
        assert found.shape == right.shape
        assert np.abs(found - right).max() <= 1e-5 * np.abs(right).max()
    assert zero_points_to_biases(model) == 0  # a second time there is nothing to do
    return model


@settings(max_examples=15, deadline=None)
@given(zero=st.integers(1, 254), step=st.floats(1e-3, 2.0))
def test_any_zero_and_step(zero: int, step: float) -> None:
    changed = 0 if zero == 128 else 1
    assert_the_same(lambda x: [biased(convolution(rounded(x, zero, step)))], changed)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda q: convolution(q), id="without a bias"),
        pytest.param(lambda q: biased(convolution(q), half=True), id="a bias in f16"),
        pytest.param(lambda q: biased(convolution(q, stride=2)), id="stride"),
        pytest.param(lambda q: biased(convolution(q, behind=(0, 2))), id="uneven sides"),
        pytest.param(
            lambda q: biased(convolution(q, weights(scales=np.float32(0.015)))), id="one scale"
        ),
        pytest.param(
            lambda q: biased(convolution(q, weights(1), before=(0, 0), behind=(0, 0))), id="a pixel"
        ),
        pytest.param(
            lambda q: ops.add(convolution(q), ops.constant(some_latents(1, OUT, SIDE, SIDE))),
            id="what is added is no bias",
        ),
        pytest.param(
            lambda q: convolution(
                ops.transpose(ops.reshape(q, [2, SIDE, SIDE, CHANNELS], False), [0, 3, 1, 2]),
                weights(1),
                before=(0, 0),
                behind=(0, 0),
            ),
            id="in another order",
        ),
    ],
)
def test_every_form(make: Callable[[ov.Node], ov.Node]) -> None:
    assert_the_same(lambda x: [make(rounded(x))], 1)


def test_the_kernels_run_in_eight_bits_without_zero_points() -> None:
    model = assert_the_same(lambda x: [biased(convolution(rounded(x)))], 1)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    read = {
        node.get_rt_info()["layerType"].astype(str): node.input(0).get_element_type()
        for node in compiled.get_runtime_model().get_ops()
        if node.get_input_size()
    }
    assert read["Convolution"] == read["Pad"] == ov.Type.u8
    assert [node.get_type_name() for node in model.get_ops()].count("Add") == 1  # one bias


@pytest.mark.parametrize("end", [convolution, lambda q: biased(convolution(q))])
def test_names_of_outputs_stay(end: Callable[[ov.Node], ov.Node]) -> None:
    def make(x: ov.Node) -> list[ov.Node]:
        made = end(rounded(x))
        made.output(0).set_names({"made"})
        return [made]

    assert assert_the_same(make, 1).output(0).get_names() == {"made"}


def test_what_several_read_is_padded_once() -> None:
    def make(x: ov.Node) -> list[ov.Node]:
        source = rounded(x)
        pair = [convolution(source, weights(seed=seed)) for seed in (1, 2)]
        corner = convolution(source, weights(2), before=(1, 0), behind=(0, 1))
        return [*pair, ops.relu(pair[0]), corner]

    assert kinds(assert_the_same(make, 3)).count("Pad") == 2


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: [convolution(rounded(x, 128))], id="signed"),
        pytest.param(lambda x: [convolution(rounded(x, 0))], id="zero is 0"),
        pytest.param(lambda x: [convolution(rounded(x, levels=255))], id="other levels"),
        pytest.param(
            lambda x: [
                convolution(ops.fake_quantize(x, *map(np.float32, (-0.5, 4, -0.5, 3)), 256))
            ],
            id="scaled too",
        ),
        pytest.param(
            lambda x: [convolution(ops.fake_quantize(x, *map(np.float32, (-0.507, 4.6) * 2), 256))],
            id="zero between two steps",
        ),
        pytest.param(
            lambda x: [convolution(rounded(x), ops.constant(numbers().astype(np.float32)))],
            id="weights in float",
        ),
        pytest.param(
            lambda x: [
                convolution(
                    rounded(x), weights(scales=np.full((1, CHANNELS, 1, 1), 0.01, np.float32))
                )
            ],
            id="scales by input",
        ),
        pytest.param(lambda x: [convolution(q := rounded(x)), ops.relu(q)], id="another reader"),
        pytest.param(
            lambda x: [convolution(ops.transpose(rounded(x), [0, 1, 3, 2]))],
            id="padded in another order",
        ),
    ],
)
def test_others_stay(make: Make) -> None:
    assert_the_same(make, 0)


@pytest.mark.slow
@pytest.mark.parametrize("linears", [False, True])
def test_the_unet_computes_what_it_did(linears: bool) -> None:
    graph = Graph("int8", SHAPES / "unet" / "openvino_model.xml", 128)
    model = graph.read()
    if linears:
        linears_to_convolutions(model)
    eight_bits = sum(
        node.get_type_name() == "Convolution"
        and node.input_value(1).get_node().get_type_name() == "Multiply"
        for node in model.get_ops()
    )
    assert zero_points_to_biases(model) > 0.7 * eight_bits
    assert graph.holds(graph.run(model, graph.inputs)["out_sample"])
