from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.float_layers import (
    compressed_layers,
    group_layers,
    operation_names,
    restored,
    short_name,
)
from sdvino.compress.sensitivity import LayerError, Sensitivity, measure_sensitivity, run_model
from sdvino.errors import SdvinoError
from sdvino.weights.numbers import relative_error

Array = NDArray[np.float32]
WIDTH = 8


def network() -> ov.Model:
    """Three linears of equal standing over tokens, named as an export names them.

    Tokens, not rows: with AVX-512 VNNI, OpenVINO 2026.4 computes rubbish from two 8-bit products of
    plain rows one after the other. The components' have an activation in between.
    """
    rng = np.random.default_rng(0)
    x = ops.parameter([1, -1, WIDTH], ov.Type.f32, name="sample")
    x.output(0).get_tensor().set_names({"sample"})
    value = x
    for name in ("blocks.0.a", "blocks.0.b", "blocks.1.a"):
        weights = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        product = ops.matmul(value, ops.constant(weights), False, True)
        product.set_friendly_name(f"__module.{name}/aten::linear/MatMul")
        value = ops.add(product, ops.constant(np.full((1, WIDTH), 0.1, np.float32)))
        value.set_friendly_name(f"__module.{name}/aten::linear/Add")
    return ov.Model([value], [x], "linears")


def name_of(layer: str) -> str:
    return f"__module.{layer}/aten::linear/MatMul"


def compressed(model: ov.Model, damage: dict[str, float]) -> ov.Model:
    """Put 8-bit weights, SmoothQuant's scales and FakeQuantize where NNCF would.

    ``damage`` multiplies the weights' scale of a layer: 1 is sound.
    """
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]:
        layer = short_name(op.get_friendly_name())
        weights = op.input_value(1).get_node().get_data().astype(np.float64)
        smooth = np.linspace(0.5, 2.0, WIDTH)
        weights = weights * smooth
        scale = np.abs(weights).max(1, keepdims=True) / 127
        levels = np.rint(weights / scale).astype(np.int8)
        wide = ops.convert(ops.constant(levels), "f32")
        scale = (scale * damage.get(layer, 1.0)).astype(np.float32)
        op.input(1).replace_source_output(ops.multiply(wide, ops.constant(scale)).output(0))
        fed = ops.multiply(op.input_value(0), ops.constant((1 / smooth)[None].astype(np.float32)))
        fed.set_friendly_name(f"{layer}/nncf_smooth_quant")
        ends = [ops.constant(np.float32(end)) for end in (-8, 8, -8, 8)]
        op.input(0).replace_source_output(ops.fake_quantize(fed, *ends, levels=256).output(0))
    model.validate_nodes_and_infer_types()
    return model


def run(model: ov.Model, sample: dict[str, Array]) -> Array:
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    result: Array = np.array(ov.Core().compile_model(model, "CPU", properties)(sample)[0])
    return result


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"sample": rng.standard_normal((1, 4, WIDTH)).astype(np.float32)} for _ in range(2)]


LAYERS = ("blocks.0.a", "blocks.0.b", "blocks.1.a")


def test_compressed_layers_are_found_in_order() -> None:
    base = network()
    found = compressed_layers(compressed(network(), {}), operation_names(base))
    assert found == [name_of(layer) for layer in LAYERS]
    assert compressed_layers(base, operation_names(base)) == []


def test_everything_restored_is_the_float_model(samples: list[dict[str, Array]]) -> None:
    base, broken = network(), compressed(network(), {"blocks.0.b": 3.0})
    expected = run(base, samples[0])
    before = run(broken, samples[0])
    assert relative_error(before, expected) > 0.2
    mended = restored(base, broken, [name_of(layer) for layer in LAYERS])
    assert relative_error(run(mended, samples[0]), expected) < 1e-5
    assert not any(op.get_type_name() == "FakeQuantize" for op in mended.get_ordered_ops())
    # Neither of the two that it was made from has changed.
    np.testing.assert_array_equal(run(broken, samples[0]), before)
    np.testing.assert_array_equal(run(base, samples[0]), expected)


def test_one_layer_restored_leaves_the_others_compressed(samples: list[dict[str, Array]]) -> None:
    base, broken = network(), compressed(network(), {"blocks.0.b": 3.0})
    mended = restored(base, broken, [name_of("blocks.0.b")])
    assert compressed_layers(mended, operation_names(base)) == [
        name_of("blocks.0.a"),
        name_of("blocks.1.a"),
    ]
    assert 0 < relative_error(run(mended, samples[0]), run(base, samples[0])) < 0.1


def test_layers_of_another_graph_are_refused() -> None:
    with pytest.raises(SdvinoError, match="no layer"):
        restored(network(), compressed(network(), {}), ["__module.other/MatMul"])


@pytest.mark.parametrize("damaged", LAYERS)
@pytest.mark.parametrize("max_memory", [None, 1])
def test_the_damaged_layer_comes_first(
    tmp_path: Path, samples: list[dict[str, Array]], damaged: str, max_memory: int | None
) -> None:
    paths = [tmp_path / f"{kind}.xml" for kind in ("float", "compressed")]
    ov.save_model(network(), paths[0], compress_to_fp16=True)
    ov.save_model(compressed(network(), {damaged: 1.5}), paths[1], compress_to_fp16=True)
    found = measure_sensitivity(
        "unet", paths[0], paths[1], samples, seconds=600, max_memory=max_memory
    )
    assert found.layers[0].nodes == (name_of(damaged),)
    assert found.layers[0].error > 5 * found.layers[1].error
    assert found.most_sensitive(0.5) == 1


def test_pieces_compute_what_the_whole_does(samples: list[dict[str, Array]]) -> None:
    for model in (network(), compressed(network(), {})):
        for found, whole in zip(
            run_model(model, samples, 3), run_model(model, samples), strict=True
        ):
            np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_no_time_is_said_so(tmp_path: Path, samples: list[dict[str, Array]]) -> None:
    paths = [tmp_path / f"{kind}.xml" for kind in ("float", "compressed")]
    ov.save_model(network(), paths[0], compress_to_fp16=True)
    ov.save_model(compressed(network(), {}), paths[1], compress_to_fp16=True)
    with pytest.raises(SdvinoError, match="no time"):
        measure_sensitivity("unet", paths[0], paths[1], samples, seconds=1e-6)
    with pytest.raises(SdvinoError, match="No layer"):
        measure_sensitivity("unet", paths[0], paths[0], samples, seconds=60)


def test_most_sensitive_takes_squares_as_independent() -> None:
    def entry(error: float) -> Any:
        return LayerError(("x",), "x", error)

    found = Sensitivity(component="unet", layers=(entry(4.0), entry(3.0), entry(0.0)))
    assert found.most_sensitive(0.99) == 1
    assert found.most_sensitive(0.61) == 1  # 3 of 5 is left
    assert found.most_sensitive(0.59) == 2


def test_groups_are_modules_as_deep_as_there_is_room() -> None:
    names = [name_of(layer) for layer in (*LAYERS, "head")]
    assert group_layers(names, 4) == {name: (name,) for name in names}
    assert set(group_layers(names, 3)) == {"blocks.0", "blocks.1", "head"}
    assert set(group_layers(names, 2)) == {"blocks", "head"}
    (whole,) = group_layers(names, 1).values()
    assert list(whole) == names
