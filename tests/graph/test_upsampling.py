"""Convolutions of doubled pictures as four of the picture: the same numbers, fewer products."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.float_layers import compressed_layers, operation_names, restored
from sdvino.graph.upsampling import split_like, split_upsampling, summed
from sdvino.weights.numbers import relative_error
from tests.graph.exported import xml

INPUTS, OUTPUTS = 6, 5


def doubled(source: Any, **other: Any) -> ov.Node:
    how = {
        "mode": "nearest",
        "shape_calculation_mode": "scales",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
        "axes": np.array([2, 3]),
    }
    scales = other.pop("scales", [2, 2])
    return ops.interpolate(source, np.array(scales, np.float32), **{**how, **other})


def model_of(
    *,
    bias: bool = True,
    half: bool = False,
    side: int = 3,
    pads: int = 1,
    stride: int = 1,
    **how: Any,
) -> ov.Model:
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, INPUTS, -1, -1], np.float32, name="x")
    values = rng.standard_normal((OUTPUTS, INPUTS, side, side)).astype(np.float32)
    weights: Any = ops.constant(values.astype(np.float16) if half else values)
    if half:
        weights = ops.convert(weights, "f32")
    result = ops.convolution(
        doubled(x, **how), weights, [stride] * 2, [pads] * 2, [pads] * 2, [1, 1]
    )
    result.set_friendly_name("up.conv")
    if bias:
        told = rng.standard_normal((1, OUTPUTS, 1, 1)).astype(np.float32)
        result = ops.add(result, ops.constant(told))
        result.set_friendly_name("up.conv/bias")
    return ov.Model([ops.result(ops.sqrt(ops.abs(result)))], [x], "up")


def run(model: ov.Model, size: tuple[int, int] = (5, 4), batch: int = 2) -> NDArray[np.float32]:
    x = np.random.default_rng(1).standard_normal((batch, INPUTS, *size)).astype(np.float32)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: NDArray[np.float32] = np.array(compiled(x)[0])
    return result


def kinds(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_it_computes_the_same(bias: bool, half: bool) -> None:
    model = model_of(bias=bias, half=half)
    before = run(model)
    assert split_upsampling(model) == 1
    assert "Interpolate" not in kinds(model)
    assert kinds(model).count("Convolution") == 4
    # Sums of weights in half precision are rounded to it once more.
    assert relative_error(run(model), before) < (1e-3 if half else 1e-6)
    assert run(model, (1, 1)).shape == (2, OUTPUTS, 2, 2)
    assert split_upsampling(model) == 0  # a second time there is nothing to do


def test_what_is_added_pixel_by_pixel_is_no_bias() -> None:
    model = model_of(bias=False)
    last = next(op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution")
    readers = last.output(0).get_target_inputs()
    picture = np.random.default_rng(2).standard_normal((1, OUTPUTS, 10, 8)).astype(np.float32)
    added = ops.add(last, ops.constant(picture))
    for reader in readers:
        reader.replace_source_output(added.output(0))
    before = run(model)
    assert split_upsampling(model) == 1
    assert relative_error(run(model), before) < 1e-6


def test_what_falls_on_one_pixel_is_added_up() -> None:
    weights = np.array([1.0, 10.0, 100.0], np.float32)
    assert summed(weights, 0, 0).tolist() == [1.0, 110.0]
    assert summed(weights, 1, 0).tolist() == [11.0, 100.0]


@pytest.mark.parametrize(
    "how",
    [
        {"scales": [3, 3]},
        {"scales": [2, 1]},
        {"mode": "linear"},
        {"nearest_mode": "ceil"},
        {"coordinate_transformation_mode": "half_pixel"},
        {"pads_begin": [0, 0, 1, 1]},
        {"side": 5, "pads": 2},
        {"side": 1, "pads": 0},
        {"pads": 0},
        {"stride": 2},
    ],
)
def test_others_stay(how: dict[str, Any]) -> None:
    model = model_of(**how)
    before = kinds(model)
    assert split_upsampling(model) == 0
    assert kinds(model) == before


def test_the_decoder_computes_what_it_did() -> None:
    model = ov.Core().read_model(xml("vae_decoder"))
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    before = np.array(ov.Core().compile_model(model, "CPU", exact)(latents)[0])
    products = kinds(model).count("Convolution")
    doubles = kinds(model).count("Interpolate")
    assert split_upsampling(model) == doubles > 0
    assert kinds(model).count("Convolution") == products + 3 * doubles
    after = np.array(ov.Core().compile_model(model, "CPU", exact)(latents)[0])
    assert relative_error(after, before) < 1e-5


def test_a_layer_goes_back_to_float_in_its_four_parts() -> None:
    compressed = model_of()
    split_upsampling(compressed)
    for node in compressed.get_ordered_ops():
        if node.get_type_name() == "Convolution":
            source = ops.fake_quantize(
                node.input_value(0), *map(np.float32, (-4, 4, -4, 4)), levels=16
            )
            node.input(0).replace_source_output(source.output(0))
    base = model_of()
    assert compressed_layers(compressed, operation_names(base)) == []
    split_like(base, compressed)
    layers = compressed_layers(compressed, operation_names(base))
    assert layers == [f"up.conv/phase{number}" for number in ("00", "01", "10", "11")]
    assert relative_error(run(compressed), run(base)) > 0.01
    assert relative_error(run(restored(base, compressed, layers)), run(base)) < 1e-6
    # One that was not split leaves the other as it is.
    plain = model_of()
    split_like(plain, model_of())
    assert kinds(plain) == kinds(model_of())
