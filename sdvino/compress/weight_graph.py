"""The weights of a graph as matrices, and the same weights in few bits put in their place.

Small weights stand in the graph as NNCF writes them: a constant of u8, i8, u4 or i4, Convert,
Subtract (zero points), Multiply (scales), Reshape (groups), in half precision. OpenVINO's CPU
plugin keeps them small in memory for products and embeddings, of 4 and 8 bits, by tensor, channel
and group (seen in 2026.4, AVX2 and up: the kernel reads u4 or i8). Those of convolutions it expands
to floats when it compiles: small on the disk alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.layers import CONVOLUTIONS, embeddings, nodes_with_weights
from sdvino.compress.weight_coding import Coding, Encoded, Matrix, encode
from sdvino.graph.walk import stored_constant

_FLOATS = ("f32", "f16")
_TYPES = {
    (8, True): ov.Type.i8,
    (8, False): ov.Type.u8,
    (4, True): ov.Type.i4,
    (4, False): ov.Type.u4,
}
#: Bytes of a weight in half precision.
HALF = 2


@dataclass(frozen=True, slots=True)
class WeightLayer:
    """An operation that multiplies by constant weights, or looks rows of them up."""

    #: The operation's, as the IR has it.
    name: str
    #: Its type: MatMul, Convolution, Gather ...
    kind: str
    #: Of the constant.
    shape: tuple[int, ...]
    #: The constant's axes that count output channels: one, but for grouped convolutions.
    axes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Return how many channels there are."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def width(self) -> int:
        """Return how many weights a channel has."""
        return self.size // self.rows

    @property
    def size(self) -> int:
        """Return how many weights there are."""
        return math.prod(self.shape)

    @property
    def first(self) -> bool:
        """Tell whether a channel's weights lie beside each other, as groups need them."""
        return self.axes == tuple(range(len(self.axes)))

    @property
    def convolution(self) -> bool:
        """Tell whether the CPU plugin expands these weights when it compiles."""
        return self.kind in CONVOLUTIONS

    def takes(self, coding: Coding) -> bool:
        """Tell whether the weights can be written as ``coding`` says."""
        return coding.fits(self.width) and (coding.group_size is None or self.first)


def weight_layers(model: ov.Model, ignored: Collection[str] = ()) -> list[WeightLayer]:
    """Return the layers of ``model`` whose weights are plain floats, but for ``ignored``.

    In graph order; of several operations that share their weights the first.
    """
    wanted = {*nodes_with_weights(model), *embeddings(model)} - set(ignored)
    layers: list[WeightLayer] = []
    seen: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_friendly_name() not in wanted:
            continue
        source = _source(op)
        if source is None or source.get_friendly_name() in seen:
            continue
        seen.add(source.get_friendly_name())
        shape = tuple(source.get_output_shape(0))
        axes = _channel_axes(op, shape)
        if axes is not None and math.prod(shape) > 1:
            layers.append(WeightLayer(op.get_friendly_name(), op.get_type_name(), shape, axes))
    return layers


def read_weights(op: ov.Node, layer: WeightLayer) -> Matrix:
    """Return the weights of ``op``, float32 [channels, width]; a copy."""
    source = _source(op)
    assert source is not None
    values = np.asarray(source.get_data(), np.float32)
    moved = np.moveaxis(values, layer.axes, range(len(layer.axes)))
    return np.array(moved.reshape(layer.rows, layer.width), np.float32, order="C")


def put_values(op: ov.Node, layer: WeightLayer, matrix: Matrix) -> None:
    """Put other float weights, [channels, width], in the place of those of ``op``."""
    constant = ops.constant(_to_layout(matrix, layer))
    _replace(op, constant.output(0))


def put_encoded(op: ov.Node, layer: WeightLayer, coding: Coding) -> None:
    """Write the weights of ``op`` as ``coding`` says, in place."""
    encoded = encode(read_weights(op, layer), coding)
    _replace(op, _expansion(encoded, layer, coding))


def weight_bytes(model: ov.Model) -> int:
    """Return the bytes of the constants of ``model`` as they are saved: floats in half."""
    total = 0
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type()
            count = math.prod(op.get_output_shape(0))
            bits = 16 if kind.get_type_name() == "f32" else kind.bitwidth
            total += -(-count * bits // 8)
    return total


def _source(op: ov.Node) -> ov.Node | None:
    """Return the constant of floats that holds the weights of ``op``; None where there is none."""
    node = stored_constant(op.input_value(_port(op)))
    return None if node is None or node.get_element_type().get_type_name() not in _FLOATS else node


def _port(op: ov.Node) -> int:
    return 0 if op.get_type_name() == "Gather" else 1


def _channel_axes(op: ov.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return which axes of the weights count output channels; None for a form that is not known."""
    kind = op.get_type_name()
    if kind == "Gather":
        return (0,)
    if kind == "MatMul":
        if len(shape) != 2:
            return None
        return (0,) if op.get_attributes()["transpose_b"] else (1,)
    if kind == "GroupConvolution":
        return (0, 1)
    return (1,) if kind == "ConvolutionBackpropData" else (0,)


def _to_layout(matrix: NDArray[Any], layer: WeightLayer) -> NDArray[Any]:
    """Return [channels, width] in the shape and order of the layer's constant."""
    rest = [size for axis, size in enumerate(layer.shape) if axis not in layer.axes]
    front = [layer.shape[axis] for axis in layer.axes]
    moved = matrix.reshape(*front, *rest)
    return np.ascontiguousarray(np.moveaxis(moved, range(len(layer.axes)), layer.axes))


def _expansion(encoded: Encoded, layer: WeightLayer, coding: Coding) -> ov.Output:
    """Return the nodes that make floats of ``encoded`` again."""
    scales: tuple[int, ...]
    if coding.group_size is not None:
        levels = encoded.levels.reshape(layer.rows, -1, coding.group_size)
        scales = (layer.rows, levels.shape[1], 1)
    else:
        levels = _to_layout(encoded.levels.reshape(layer.rows, layer.width), layer)
        sizes = [size if axis in layer.axes else 1 for axis, size in enumerate(layer.shape)]
        scales = tuple(sizes) if coding.granularity == "channel" else (1,) * len(sizes)
    kind = _TYPES[coding.bits, coding.symmetric]
    value = ops.convert(ops.constant(levels, dtype=kind), ov.Type.f16)
    if encoded.zero is not None:
        zero = ops.constant(encoded.zero.reshape(scales), dtype=kind)
        value = ops.subtract(value, ops.convert(zero, ov.Type.f16))
    value = ops.multiply(value, ops.constant(encoded.scale.reshape(scales)))
    if coding.group_size is not None:
        value = ops.reshape(value, np.array(layer.shape, np.int64), False)
    return ops.convert(value, ov.Type.f32).output(0)


def _replace(op: ov.Node, value: ov.Output) -> None:
    """Give ``value`` to everything that reads the weights of ``op``."""
    old = op.input_value(_port(op))
    for target in old.get_target_inputs():
        target.replace_source_output(value)
