"""Exact rewrite: a scale by channel goes into the numbers that made the channels.

Quantization with SmoothQuant puts a product by constants before every linear layer. After a layer
norm it can be part of the norm's own weight and bias; after an attention or a GEGLU, of the scales
of the 8-bit weights that the values came from. Then it costs nothing.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.walk import consumers, is_constant, stored_constant

Array = NDArray[np.float32]


def fold_scales(model: ov.Model) -> int:
    """Fold products by constants into what comes before them, in place; exact.

    Returns how many were folded; those after anything else stay as they are.
    """
    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        data, scale = node.input_value(0), node.input_value(1)
        values = _values(scale)
        if values is None or is_constant(data) or not _by_channel(data, values):
            continue
        if _fold(data, values.reshape(-1)):
            node.output(0).replace(data)
            done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _by_channel(data: ov.Output, scale: Array) -> bool:
    """Return whether ``scale`` has one number for each of the last dimension of ``data``."""
    shape = data.get_partial_shape()
    if scale.ndim == 0 or not shape.rank.is_static or not shape[-1].is_static:
        return False
    return bool(scale.size == scale.shape[-1] == shape[-1].get_length())


def _fold(port: ov.Output, scale: Array) -> bool:
    """Scale the channels of ``port`` where they are made; return False where that cannot be."""
    node = port.get_node()
    kind = node.get_type_name()
    if len(consumers(port)) != 1:
        return False
    if kind == "Multiply" and not any(is_constant(source) for source in node.input_values()):
        # GEGLU: value times gate. The value is what comes straight from a product.
        return any(_fold_linear(source, scale) for source in node.input_values())
    if kind == "Reshape":
        return _fold_attention(node, scale)
    return _fold_norm(node, scale) or _fold_linear(port, scale)


def _fold_norm(node: ov.Node, scale: Array) -> bool:
    """Fold into a layer norm: MVN, times a weight, plus a bias."""
    if node.get_type_name() != "Add":
        return False
    product, bias = node.input_value(0), _values(node.input_value(1))
    inner = product.get_node()
    if bias is None or inner.get_type_name() != "Multiply" or len(consumers(product)) != 1:
        return False
    weight = _values(inner.input_value(1))
    if weight is None or inner.input_value(0).get_node().get_type_name() != "MVN":
        return False
    _give(inner, 1, weight * scale)
    _give(node, 1, bias * scale)
    return True


def _fold_attention(node: ov.Node, scale: Array) -> bool:
    """Fold through an attention into its values: each channel of its output is one of theirs."""
    port = node.output(0)
    for kind in ("Reshape", "Transpose", "ScaledDotProductAttention"):
        node = port.get_node()
        if node.get_type_name() != kind or len(consumers(port)) != 1:
            return False
        port = node.input_value(0)
    heads = node.input_value(2)
    for kind in ("Transpose", "Reshape"):
        if heads.get_node().get_type_name() != kind or len(consumers(heads)) != 1:
            return False
        heads = heads.get_node().input_value(0)
    return _fold_linear(heads, scale)


def _fold_linear(port: ov.Output, scale: Array) -> bool:
    """Fold into a product with 8-bit weights and its bias."""
    node = port.get_node()
    if len(consumers(port)) != 1:
        return False
    bias = None
    if node.get_type_name() == "Add":
        bias = _values(node.input_value(1))
        product = node.input_value(0).get_node()
        if bias is None or len(consumers(node.input_value(0))) != 1:
            return False
    else:
        product = node
    if product.get_type_name() != "MatMul" or not product.get_attributes()["transpose_b"]:
        return False
    weights = product.input_value(1)
    scaled = weights.get_node()
    if scaled.get_type_name() == "Convert":  # compressed weights: to f32 after the scale
        scaled = scaled.input_value(0).get_node()
    own = _values(scaled.input_value(1)) if scaled.get_type_name() == "Multiply" else None
    if own is None or own.ndim != 2 or own.shape[1] != 1 or not _alone(weights, scaled):
        return False
    if scaled.get_output_element_type(0) != ov.Type.f32:
        return False  # the folded scales would be rounded to half precision
    _give(scaled, 1, own * scale[:, None])
    if bias is not None:
        _give(node, 1, bias * scale)
    return True


def _alone(weights: ov.Output, scaled: ov.Node) -> bool:
    return len(consumers(weights)) == 1 and len(consumers(scaled.output(0))) == 1


def _values(port: ov.Output) -> Array | None:
    """Return the numbers of a constant, or of one kept in half precision; None for others."""
    node = stored_constant(port)
    if node is None or not node.get_element_type().is_real():
        return None
    return np.asarray(node.get_data(), np.float32)


def _give(node: ov.Node, index: int, values: Array) -> None:
    constant = ops.constant(np.ascontiguousarray(values, np.float32))
    node.input(index).replace_source_output(constant.output(0))
