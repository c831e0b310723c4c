"""Exact rewrite: linear layers in 8 bits become convolutions of one pixel, with the same numbers.

Without VNNI, OpenVINO's CPU plugin runs a linear layer of 8 bits as a plain matrix product that is
no faster than in f32; its convolutions have kernels of their own for AVX2, more than twice as fast
(scripts/bench_linears.py). They keep channels last, as tokens [B, N, C] lie in memory, so that the
transposes around them copy nothing.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.graph.walk import bias_of, consumers, stored_constant, view_constant

_EIGHT_BITS = (ov.Type.i8, ov.Type.u8)
_ARITHMETIC = {"Multiply": ops.multiply, "Subtract": ops.subtract}
#: Tokens [B, 1, N, C] to channels [B, C, 1, N], and back.
_TO_CHANNELS = (0, 3, 1, 2)
_TO_TOKENS = (0, 2, 3, 1)


def linears_to_convolutions(model: ov.Model) -> int:
    """Turn every product of quantized tokens [B, N, C] with 8-bit weights, in place; exact.

    Needs fixed shapes. A bias and a GELU that follow come along, so that they are part of the
    convolution's kernel. Returns how many were rewritten; those in another form stay as they are.
    """
    done = 0
    # What several products read is turned once.
    turned: dict[ov.Node, ov.Node] = {}
    for node in model.get_ordered_ops():
        if not _is_quantized_linear(node):
            continue
        source = node.input_value(0)
        if source.get_node() not in turned:
            turned[source.get_node()] = _to_channels(source)
        _replace(node, turned[source.get_node()])
        done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _is_quantized_linear(node: ov.Node) -> bool:
    """Return whether ``node`` is a product of quantized tokens of fixed number and weights."""
    if node.get_type_name() != "MatMul":
        return False
    source, weights = node.input_values()
    how = node.get_attributes()
    shape = source.get_partial_shape()
    return (
        source.get_node().get_type_name() == "FakeQuantize"
        and _weights_known(weights)
        and not how["transpose_a"]
        and bool(how["transpose_b"])
        and shape.is_static
        and len(shape) == 3
    )


def _to_channels(source: ov.Output) -> ov.Node:
    batch, tokens, channels = source.get_shape()
    return ops.transpose(ops.reshape(source, [batch, 1, tokens, channels], False), _TO_CHANNELS)


def _replace(node: ov.Node, source: ov.Node) -> None:
    """Put a convolution of ``source`` in the place of the product ``node`` and what follows it."""
    weights = _as_pixel(node.input_value(1))
    batch, tokens, channels = node.get_output_shape(0)
    name, last = node.get_friendly_name(), node
    result = ops.convolution(source, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    result.set_friendly_name(name)
    port = bias_of(node)
    bias = None if port is None else port.get_source_output()
    if port is not None and bias is not None and _by_channel(bias, channels):
        result = ops.add(result, ops.reshape(bias, [1, channels, 1, 1], False))
        last = port.get_node()
    following = _only_reader(last)
    if following is not None and following.get_type_name() == "Gelu":
        result = ops.gelu(result, following.get_attributes()["approximation_mode"])
        last = following
    back = ops.reshape(ops.transpose(result, _TO_TOKENS), [batch, tokens, channels], False)
    back.set_friendly_name(f"{name}/tokens")
    last.output(0).replace(back.output(0))


def _only_reader(node: ov.Node) -> ov.Node | None:
    readers = consumers(node.output(0))
    return readers[0] if len(readers) == 1 else None


def _by_channel(port: ov.Output, channels: int) -> bool:
    """Return whether ``port`` has one number for each channel of tokens [B, N, C]."""
    shape = list(port.get_shape())
    return bool(shape) and shape[-1] == int(np.prod(shape)) == channels


def _weights_known(port: ov.Output) -> bool:
    """Return whether ``port`` is 8-bit numbers [O, I], perhaps less zero points, times scales."""
    node = port.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_element_type() in _EIGHT_BITS and len(port.get_shape()) == 2
    if kind == "Convert":
        return _weights_known(node.input_value(0))
    return kind in _ARITHMETIC and (
        _weights_known(node.input_value(0)) and _known_beside(node.input_value(1))
    )


def _known_beside(port: ov.Output) -> bool:
    """Return whether ``port`` is one number, or one for each row or each number of the weights."""
    node = stored_constant(port)
    shape = [] if node is None else list(node.get_output_shape(0))
    return node is not None and (len(shape) == 2 or shape in ([], [1]))


def _as_pixel(port: ov.Output) -> ov.Output:
    """Return what `_weights_known` knows, [O, I], as the weights [O, I, 1, 1] of a convolution."""
    node = port.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        values = node.get_data()
        if values.ndim < 2:
            return port
        return view_constant(node, values.reshape(*values.shape, 1, 1))
    if kind == "Convert":
        inner = _as_pixel(node.input_value(0))
        return ops.convert(inner, port.get_element_type().to_string()).output(0)
    return _ARITHMETIC[kind](*map(_as_pixel, node.input_values())).output(0)
