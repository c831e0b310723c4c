"""Exact rewrite: a projection that is split in two becomes two projections.

GEGLU projects to twice the width and cuts the result in halves, value and gate. The CPU plugin runs
that cut as a copy of the whole feature map; two products with half the weights each need none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.graph.walk import consumers, is_constant, view_constant

_SPLITS = frozenset({"VariadicSplit", "Split"})
_ELEMENTWISE = {"Multiply": ops.multiply, "Subtract": ops.subtract, "Add": ops.add}


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of ``parts`` equal pieces along ``axis``."""

    axis: int
    number: int
    parts: int = 2


class _CannotCut(Exception):
    """Raised for weights in a form that is not known; the graph then stays as it is."""


def split_projections(model: ov.Model) -> int:
    """Turn every product that is cut in halves, in place, into two products; exact.

    Weights may be floats, or 8-bit with scales and zero points (both forms of NNCF): they are cut
    along. Needs frozen shapes (see sdvino.graph.walk). Returns how many were rewritten; those in a
    form that is not known stay as they are.
    """
    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() not in _SPLITS or node.get_output_size() != 2:
            continue
        if not _halves_channels(node):
            continue
        try:
            halves = [_half(node.input_value(0), number) for number in range(2)]
        except _CannotCut:
            continue
        for number, half in enumerate(halves):
            node.output(number).replace(half)
        done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _halves_channels(node: ov.Node) -> bool:
    """Return whether the split is in two equal parts along the last axis."""
    data, parts = node.input_value(0).get_partial_shape(), node.outputs()
    shapes = [data, *(port.get_partial_shape() for port in parts)]
    if not all(shape.is_static for shape in shapes):
        return False
    whole, first, second = (list(shape.get_shape()) for shape in shapes)
    return first == second and first[:-1] == whole[:-1] and whole[-1] == 2 * first[-1]


def _half(port: ov.Output, number: int) -> ov.Output:
    """Return one half of the channels of ``port``: a product, or what follows one."""
    node = port.get_node()
    kind = node.get_type_name()
    if len(consumers(port)) != 1:
        raise _CannotCut
    if kind == "Add":
        data, bias = node.input_value(0), node.input_value(1)
        if is_constant(data):
            data, bias = bias, data
        if not is_constant(bias):
            raise _CannotCut
        half = ops.add(_half(data, number), _cut(bias, _Part(-1, number)))
    elif kind == "FakeQuantize":
        ranges = node.input_values()[1:]
        if any(np.prod(limit.get_shape()) != 1 for limit in ranges):
            raise _CannotCut
        half = ops.fake_quantize(
            _half(node.input_value(0), number), *ranges, node.get_attributes()["levels"]
        )
    elif kind == "MatMul" and is_constant(node.input_value(1)):
        how = node.get_attributes()
        weights = _cut(node.input_value(1), _Part(-2 if how["transpose_b"] else -1, number))
        half = ops.matmul(node.input_value(0), weights, how["transpose_a"], how["transpose_b"])
    else:
        raise _CannotCut
    half.set_friendly_name(f"{node.get_friendly_name()}.{number}")
    return half.output(0)


def _cut(port: ov.Output, part: _Part) -> ov.Output:
    """Return a piece of what is computed from constants alone; axes count from the end."""
    node = port.get_node()
    kind = node.get_type_name()
    shape = list(port.get_shape())
    if len(shape) < -part.axis or shape[part.axis] == 1:
        return port  # the same for all channels
    if kind == "Constant":
        return _cut_constant(node, part)
    if kind == "Convert":
        cut = _cut(node.input_value(0), part)
        return ops.convert(cut, port.get_element_type().to_string()).output(0)
    if kind in _ELEMENTWISE:
        cut_inputs = [_cut(source, part) for source in node.input_values()]
        return _ELEMENTWISE[kind](*cut_inputs).output(0)
    raise _CannotCut


def _cut_constant(node: ov.Node, part: _Part) -> ov.Output:
    if node.get_element_type().bitwidth < 8:
        raise _CannotCut  # two numbers in a byte
    values = node.get_data()
    width = values.shape[part.axis] // part.parts
    window = [slice(None)] * values.ndim
    window[part.axis] = slice(part.number * width, (part.number + 1) * width)
    piece = values[tuple(window)]
    if not piece.flags.c_contiguous:  # columns have to be gathered
        return ops.constant(np.ascontiguousarray(piece)).output(0)
    return view_constant(node, piece)
