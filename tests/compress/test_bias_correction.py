from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.bias_correction import (
    constant_value,
    correct_biases,
    float_layers,
    mean_output,
)
from sdvino.compress.quantization import measure
from tests.compress import nets

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(
    ("strides", "pads", "dilations"),
    [([1, 1], [1, 1], [1, 1]), ([2, 2], [0, 1], [1, 1]), ([1, 1], [2, 2], [2, 2])],
)
def test_the_mean_of_a_convolution_is_that_of_its_means(
    strides: list[int], pads: list[int], dilations: list[int]
) -> None:
    weights = RNG.standard_normal((5, 3, 3, 3), dtype=np.float32)
    means = RNG.standard_normal(3, dtype=np.float32)
    x = nets.parameter([1, 3, 8, 10], "sample")
    node = ops.convolution(x, ops.constant(weights), strides, pads, pads[::-1], dilations)
    picture = np.broadcast_to(means[:, None, None], (3, 8, 10))[None].copy()
    expected = nets.run(ov.Model([node], [x]), {"sample": picture}).mean(axis=(0, 2, 3))
    found = mean_output(node, weights, means, (1, 3, 8, 10))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def rounded(weights: Any) -> Any:
    """Weights in whole numbers, as NNCF leaves them."""
    scale = np.abs(weights).max() / 3
    levels = ops.constant(np.round(weights / scale).astype(np.int8))
    return ops.multiply(ops.convert(levels, "f32"), ops.constant(np.float32(scale)))


def test_the_mean_of_the_output_is_what_it_was(tmp_path: Path) -> None:
    x = nets.parameter([-1, nets.CHANNELS, -1, -1], "sample")
    wide = nets.linear(ops.reshape(x, [1, -1, nets.CHANNELS], False), "to_q", RNG)
    model = ov.Model([wide], [x], "one")
    samples = [{"sample": sample["sample"] + 1} for sample in nets.samples()]
    expected = np.mean([nets.run(model, sample) for sample in samples], axis=(0, 1, 2))
    for operation in model.get_ops():
        operation.set_friendly_name(operation.get_friendly_name())
    layers = float_layers(model, {})
    assert list(layers) == ["__module.to_q/aten::linear/MatMul"]
    statistics = measure(model.clone(), samples, tmp_path / "one.bin")
    product = next(op for op in model.get_ops() if op.get_type_name() == "MatMul")
    product.input(1).replace_source_output(
        rounded(constant_value(product.input_value(1))).output(0)
    )
    before = np.mean([nets.run(model, sample) for sample in samples], axis=(0, 1, 2))
    assert np.abs(before - expected).max() > 0.05
    correct_biases(model, layers, statistics)
    after = np.mean([nets.run(model, sample) for sample in samples], axis=(0, 1, 2))
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_layers_that_stay_in_float_keep_their_biases(tmp_path: Path) -> None:
    model = nets.residual_network()
    for operation in model.get_ops():
        operation.set_friendly_name(operation.get_friendly_name())
    expected = nets.run(model, nets.samples()[0])
    statistics = measure(model.clone(), nets.samples(), tmp_path / "a.bin")
    layers = float_layers(model, {})
    assert len(layers) == 3
    correct_biases(model, layers, statistics)
    np.testing.assert_array_equal(nets.run(model, nets.samples()[0]), expected)
