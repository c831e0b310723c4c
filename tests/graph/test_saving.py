"""A saved graph has the same bytes whatever the process did before."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.graph.saving import given_names, name_by_position, read_ir, save_graph, save_ir

LAYER = "__module.mid_block.conv/aten::_convolution/Convolution"


def net() -> ov.Model:
    """One layer with a name, and around it what OpenVINO names by itself."""
    x = ops.parameter([-1, 4, -1, -1], ov.Type.f32, name="sample")
    x.output(0).set_names({"sample"})
    weights = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    layer = ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    layer.set_friendly_name(LAYER)
    # As the frontend leaves a half-precision weight whose name was made up.
    half = ops.constant(weights.astype(np.float16))
    float_ = ops.convert(half, "f32")
    half.set_friendly_name(f"{half.get_friendly_name()}_compressed")
    other = ops.convolution(layer, float_, [1, 1], [1, 1], [1, 1], [1, 1])
    total = ops.add(ops.add(other, layer), ops.constant(np.float32(2)))
    result = ops.result(ops.relu(total))
    total.output(0).set_names({total.get_friendly_name(), "total"})
    return ov.Model([result], [x])


def burn(count: int) -> None:
    for _ in range(count):
        ops.constant(np.float32(0))


def names(model: ov.Model) -> list[str]:
    return [op.get_friendly_name() for op in model.get_ordered_ops()]


def content(xml: Path) -> tuple[bytes, bytes]:
    return xml.read_bytes(), xml.with_suffix(".bin").read_bytes()


def test_the_bytes_do_not_depend_on_what_was_made_before(tmp_path: Path) -> None:
    found = []
    for index, count in enumerate((0, 7, 12_345)):
        burn(count)
        save_graph(net(), tmp_path / f"{index}.xml", name="unet")
        found.append(content(tmp_path / f"{index}.xml"))
    assert found[0] == found[1] == found[2]


def test_without_it_they_do(tmp_path: Path) -> None:
    """Should OpenVINO name by position one day, all this can go."""
    for index in range(2):
        ov.save_model(net(), tmp_path / f"{index}.xml")
        burn(7)
    assert content(tmp_path / "0.xml") != content(tmp_path / "1.xml")


def test_layers_keep_their_names_and_no_automatic_one_is_left() -> None:
    model = net()
    name_by_position(model)
    found = names(model)
    assert LAYER in found
    assert "sample" in found
    assert not any(re.fullmatch(r"[A-Z]\w*_\d+(_compressed)?", name) for name in found)
    assert len(set(found)) == len(found)


def test_what_is_named_after_another_operation_follows_it() -> None:
    model = net()
    name_by_position(model)
    halves = [name for name in names(model) if name.endswith("_compressed")]
    assert [re.sub(r"\d+", "#", name) for name in halves] == ["Constant.#_compressed"]
    [total] = [op for op in model.get_ops() if "total" in op.output(0).get_names()]
    assert total.output(0).get_names() == {"total", total.get_friendly_name()}


def test_a_name_that_stands_is_given_to_nobody_else() -> None:
    model = net()
    [first] = [op for op in model.get_ops() if op.get_type_name() == "Relu"]
    first.set_friendly_name("Add.0")
    name_by_position(model)
    assert first.get_friendly_name() == "Add.0"
    assert len(set(names(model))) == len(names(model))


def test_naming_again_changes_nothing() -> None:
    model = net()
    name_by_position(model)
    before = names(model)
    name_by_position(model)
    assert names(model) == before


def compressed(xml: Path) -> ov.Model:
    """What compression makes of a file: a graph with some more operations, cloned on the way."""
    model = read_ir(xml)
    [layer] = [op for op in model.get_ops() if op.get_friendly_name() == LAYER]
    scaled = ops.multiply(layer.input_value(0), ops.constant(np.float32(3)))
    layer.input(0).replace_source_output(scaled.output(0))
    return model.clone()


@pytest.mark.parametrize("ours", [True, False], ids=["from us", "from elsewhere"])
def test_what_a_file_called_its_operations_stays_in_what_is_made_of_it(
    ours: bool, tmp_path: Path
) -> None:
    """The gate finds a layer by its name in both, also one that only OpenVINO has named."""
    float_xml = tmp_path / "float.xml"
    if ours:
        save_graph(net(), float_xml)
    else:
        ov.save_model(net(), float_xml, compress_to_fp16=True)
    standing = given_names(read_ir(float_xml))
    found = []
    for index in range(2):
        burn(100)
        xml = tmp_path / f"{index}.xml"
        save_graph(compressed(float_xml), xml, name="unet", standing=standing)
        found.append(content(xml))
        assert standing < set(names(read_ir(xml)))
    assert found[0] == found[1]


def test_a_new_operation_called_like_one_of_the_file_gets_another_name() -> None:
    model = net()
    [relu] = [op for op in model.get_ops() if op.get_type_name() == "Relu"]
    new = ops.constant(np.float32(3))
    name = new.get_friendly_name()
    relu.set_friendly_name(name)  # as if a file had it so
    relu.input(0).replace_source_output(ops.multiply(relu.input_value(0), new).output(0))
    name_by_position(model, {name})
    assert relu.get_friendly_name() == name
    assert new.get_friendly_name() != name
    assert len(set(names(model))) == len(names(model))


def test_a_file_that_is_written_over_keeps_its_names(tmp_path: Path) -> None:
    xml = tmp_path / "openvino_model.xml"
    ov.save_model(net(), xml, compress_to_fp16=True)
    before = names(read_ir(xml))
    save_ir(read_ir(xml), xml)
    assert names(read_ir(xml)) == before


def test_thousands_of_operations_are_named_in_no_time() -> None:
    x = ops.parameter([1], ov.Type.f32, name="x")
    value: Any = x
    for _ in range(5_000):
        value = ops.add(value, ops.constant(np.float32(1)))
    model = ov.Model([ops.result(value)], [x])
    began = time.perf_counter()
    name_by_position(model)
    assert time.perf_counter() - began < 5.0  # 0.1 s on a laptop
