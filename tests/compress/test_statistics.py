from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.quantization import measure
from sdvino.compress.statistics import Recorder, Statistics, has_statistics, read_by_products
from sdvino.errors import SdvinoError
from tests.compress import nets

SAMPLES = nets.samples()
TO_OUT = "__module.attn1/aten::scaled_dot_product_attention/SDPA"


def attention_network() -> ov.Model:
    """That of `nets`, with names that its clones have too."""
    model = nets.attention_network()
    for operation in model.get_ops():
        operation.set_friendly_name(operation.get_friendly_name())
    return model


def measured(folder: Path) -> Statistics:
    return measure(attention_network(), SAMPLES, folder / "unet.bin")


def test_what_products_read_is_found_with_its_channels() -> None:
    found = {
        value.get_node().get_friendly_name(): axis
        for value, axis in read_by_products(attention_network()).items()
    }
    assert found["sample"] == 1  # of conv_in
    assert found[TO_OUT] == 2  # of a linear
    assert found["__module.attn1.to_q/aten::linear/Add"] is None  # of attention
    assert len(found) == 7


def test_weights_on_the_left_and_transposed_inputs_have_their_channels() -> None:
    matrix = ops.constant(np.ones((3, 5), np.float32))
    for shape, left, transposed, axis in (
        ([1, 7, 3], False, False, 2),
        ([1, 3, 7], False, True, 1),
        ([1, 5, 7], True, False, 1),
        ([1, 7, 5], True, True, 2),
    ):
        x = nets.parameter(shape, "x")
        if left:
            product = ops.matmul(matrix, x, False, transposed)
        else:
            product = ops.matmul(x, matrix, transposed, False)
        assert list(read_by_products(ov.Model([product], [x], "one")).values()) == [axis]


def test_statistics_are_those_of_the_values(tmp_path: Path) -> None:
    statistics = measured(tmp_path)
    assert statistics.evaluations == len(SAMPLES)
    first = statistics.find(("sample", 0))
    assert first is not None
    pictures = np.concatenate([sample["sample"] for sample in SAMPLES])
    np.testing.assert_allclose(first.low, pictures.min(axis=(2, 3)), rtol=1e-6)
    np.testing.assert_allclose(first.high, pictures.max(axis=(2, 3)), rtol=1e-6)
    np.testing.assert_allclose(first.mean, pictures.mean(axis=(0, 2, 3)), atol=1e-6)
    assert (first.axis, first.shape) == (1, (1, nets.CHANNELS, nets.SIDE, nets.SIDE))
    inner = statistics.find((TO_OUT, 0))
    assert inner is not None
    model = attention_network()
    node = next(op for op in model.get_ops() if op.get_friendly_name() == TO_OUT)
    cut = ov.Model([node.output(0)], model.get_parameters())
    values = np.stack([nets.run(cut, sample)[0] for sample in SAMPLES])
    np.testing.assert_allclose(inner.high, values.max(axis=1), rtol=1e-5, atol=1e-6)
    half = inner.scaled(np.full(64, 0.5, np.float32))
    np.testing.assert_array_equal(half.low, inner.low / 2)


def test_some_evaluations_can_be_looked_at_alone(tmp_path: Path) -> None:
    whole = measured(tmp_path).find(("sample", 0))
    some = Statistics(tmp_path / "unet.bin", rows=[2, 0])
    found = some.find(("sample", 0))
    assert whole is not None
    assert found is not None
    assert some.evaluations == 2
    np.testing.assert_array_equal(found.low, whole.low[[2, 0]])


@pytest.mark.parametrize("damage", ["cut", "text", "points", "absent"])
def test_damaged_statistics_are_named(tmp_path: Path, damage: str) -> None:
    measured(tmp_path)
    values, index = tmp_path / "unet.bin", tmp_path / "unet.json"
    if damage == "cut":
        values.write_bytes(values.read_bytes()[:-4])
    elif damage == "text":
        index.write_text("{")
    elif damage == "points":
        index.write_text('{"evaluations": 4, "points": [{"name": "x"}]}')
    else:
        values.unlink()
    with pytest.raises(SdvinoError, match=r"unet\.bin.*convert again"):
        Statistics(values)


def test_statistics_that_are_not_finished_are_none(tmp_path: Path) -> None:
    Recorder(tmp_path / "unet.bin")
    assert not has_statistics(tmp_path / "unet.bin")
    measured(tmp_path)
    assert has_statistics(tmp_path / "unet.bin")
