"""Biases that take back what rounded weights add to a layer's output in the mean.

The mean of a product with weights W over inputs of the means m is W m, with rounded weights it is
another: the difference goes into the bias. At the edges of a picture a convolution reads zeros, so
each of its taps counts for the share of positions at which it reads the picture.
Source: Nagel et al. 2019 (arXiv:1906.04721), "quantization bias correction"; NNCF's fast bias
correction, which evaluates each layer on its means, and leaves layers alone with a bias of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.statistics import Statistics, value_of
from sdvino.graph.cut import Value
from sdvino.graph.walk import bias_of, is_constant

Array = NDArray[np.float32]

#: The end of the name of what SmoothQuant puts in front of linears: factors of channels.
_SMOOTHING = "/nncf_smooth_quant"
_BETWEEN = {"Add": np.add, "Multiply": np.multiply, "Subtract": np.subtract}


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """A product with weights as it was before it was quantized."""

    weights: ov.Output
    #: What it reads.
    source: Value


def float_layers(model: ov.Model, crossing: Mapping[str, Value]) -> dict[str, FloatLayer]:
    """Return the products of float weights that a bias is added to, by name."""
    found = {}
    for node in model.get_ops():
        if _bias(node) is None:
            continue
        weights = node.input_value(_weights_port(node))
        if not _is_integer(weights):
            source = value_of(node.input_value(1 - _weights_port(node)), crossing)
            found[node.get_friendly_name()] = FloatLayer(weights, source)
    return found


def correct_biases(
    model: ov.Model, layers: Mapping[str, FloatLayer], statistics: Statistics
) -> None:
    """Correct the biases of the ``layers`` of ``model`` that are quantized now, in place."""
    for node in model.get_ordered_ops():
        layer = layers.get(node.get_friendly_name())
        bias = _bias(node)
        if layer is None or bias is None or not _is_integer(node.input_value(_weights_port(node))):
            continue
        channels = statistics.find(layer.source)
        if channels is None:
            continue
        factors = smoothing(_before_rounding(node.input_value(1 - _weights_port(node))))
        scaled = channels.mean if factors is None else channels.mean * factors
        rounded = node.input_value(_weights_port(node))
        shift = mean_output(node, constant_value(layer.weights), channels.mean, channels.shape)
        shift -= mean_output(node, constant_value(rounded), scaled, channels.shape)
        old = bias.get_source_output()
        before = constant_value(old)
        corrected: Any = ops.constant(before + shift.reshape(before.shape))
        corrected.set_friendly_name(old.get_node().get_friendly_name())
        bias.replace_source_output(corrected.output(0))


def mean_output(node: ov.Node, weights: Array, means: Array, shape: Sequence[int]) -> Array:
    """Return the mean of every output channel of the product ``node`` with ``weights``.

    ``means`` are those of the channels that it reads, ``shape`` the shape of what it reads.
    """
    if node.get_type_name() == "MatMul":
        port = _weights_port(node)
        transposed = node.get_attributes()[f"transpose_{'ab'[port]}"]
        matrix = weights if transposed == bool(port) else weights.T
        return np.asarray(matrix @ means, np.float32)
    how = node.get_attributes()
    taps = np.ones(1, np.float32)
    for axis, size in enumerate(shape[2:]):
        stride, dilation = how["strides"][axis], how["dilations"][axis]
        before, after = how["pads_begin"][axis], how["pads_end"][axis]
        kernel = weights.shape[2 + axis]
        count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
        positions = stride * np.arange(count)[:, None] - before + dilation * np.arange(kernel)
        inside = ((positions >= 0) & (positions < size)).mean(axis=0) if size else np.ones(kernel)
        taps = np.outer(taps, inside).ravel().astype(np.float32)
    return np.asarray(weights.reshape(len(weights), -1) @ np.outer(means, taps).ravel(), np.float32)


def smoothing(value: ov.Output) -> Array | None:
    """Return the factors of channels by which SmoothQuant made ``value``; None where it did not."""
    node = value.get_node()
    if not node.get_friendly_name().endswith(_SMOOTHING):
        return None
    return constant_value(node.input_value(1)).reshape(-1)


def constant_value(value: ov.Output) -> Array:
    """Return in float32 what ``value``, computed from constants alone, is."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        stored: Array = node.get_data(dtype=np.float32)
        return stored
    if kind == "Convert":
        return constant_value(node.input_value(0))
    if kind in _BETWEEN:
        computed: Array = _BETWEEN[kind](*map(constant_value, node.input_values()))
        return computed
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(ov.Model([value], []), "CPU", exact)
    return np.array(compiled({})[0], np.float32)


def _bias(node: ov.Node) -> ov.Input | None:
    """Return where the bias of a product with weights is added; None unless there is one."""
    if node.get_type_name() not in ("Convolution", "MatMul"):
        return None
    if sum(map(is_constant, node.input_values())) != 1:
        return None
    return bias_of(node)


def _weights_port(node: ov.Node) -> int:
    return 0 if is_constant(node.input_value(0)) else 1


def _before_rounding(value: ov.Output) -> ov.Output:
    """Return what a FakeQuantize rounds; ``value`` itself where none does."""
    node = value.get_node()
    return node.input_value(0) if node.get_type_name() == "FakeQuantize" else value


def _is_integer(weights: ov.Output) -> bool:
    """Return whether ``weights`` are stored as whole numbers."""
    node = weights.get_node()
    while node.get_input_size():
        node = node.input_value(0).get_node()
    return bool(node.get_element_type().is_integral())
