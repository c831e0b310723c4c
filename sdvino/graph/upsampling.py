"""Exact rewrite: a convolution of a picture twice as large becomes four of the picture itself.

Each pixel of an upsampled picture stands there four times, so a 3 x 3 kernel sees 2 x 2 different
ones and multiplies some of them more than once. With the weights that fall on the same pixel added
up before, each of the four pixels that one becomes is a kernel of 2 x 2: 16 products where there
were 36. The three of Stable Diffusion 1.5's decoder are 28 % of its products. In 8 bits the sums
get scales of their own, so this comes before quantization.
Source: the sub-pixel view of such convolutions, Shi et al. 2016 (arXiv:1609.07009).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.walk import bias_of, stored_constant

_PHASES = tuple((row, column) for row in (0, 1) for column in (0, 1))
#: What the name of a phase has behind that of its convolution.
_MARK = "/phase"


def split_upsampling(model: ov.Model) -> int:
    """Rewrite every 3 x 3 convolution of a doubled picture [N, C, H, W], in place; exact.

    Its weights are float constants; it may have a bias. Returns how many were rewritten; others,
    as those whose size is only known when they run, stay as they are.
    """
    done = 0
    for node in model.get_ordered_ops():
        if _is_split(node):
            _split(node)
            done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def split_like(model: ov.Model, other: ov.Model) -> None:
    """Rewrite ``model`` if `split_upsampling` rewrote ``other``, which was exported alike."""
    if any(_MARK in op.get_friendly_name() for op in other.get_ops()):
        split_upsampling(model)


def _is_split(node: ov.Node) -> bool:
    if node.get_type_name() != "Convolution":
        return False
    source, weights = node.input_values()
    how = node.get_attributes()
    shape = weights.get_partial_shape()
    return (
        _is_doubling(source.get_node())
        and _floats(weights) is not None
        and shape.is_static
        and list(weights.get_shape())[2:] == [3, 3]
        and all(list(how[name]) == [1, 1] for name in ("strides", "dilations"))
        and all(list(how[name]) == [1, 1] for name in ("pads_begin", "pads_end"))
        and how["auto_pad"] == "explicit"
    )


def _is_doubling(node: ov.Node) -> bool:
    """Return whether ``node`` repeats every pixel twice along both sides of a picture."""
    if node.get_type_name() != "Interpolate" or node.get_input_size() < 3:
        return False
    how = node.get_attributes()
    scales, axes = (node.input_value(index).get_node() for index in (1, 2))
    return (
        how["mode"] == "nearest"
        and how["nearest_mode"] == "floor"
        and how["coordinate_transformation_mode"] == "asymmetric"
        and how["shape_calculation_mode"] == "scales"
        and not any([*how["pads_begin"], *how["pads_end"]])
        and all(port.get_type_name() == "Constant" for port in (scales, axes))
        and scales.get_data().tolist() == [2, 2]
        and axes.get_data().tolist() == [2, 3]
    )


def _floats(port: ov.Output) -> NDArray[Any] | None:
    """Return the weights at ``port``, stored in f32 or f16; None for others."""
    node = stored_constant(port)
    if node is None or node.get_element_type() not in (ov.Type.f32, ov.Type.f16):
        return None
    values: NDArray[Any] = node.get_data()
    return values


def _split(node: ov.Node) -> None:
    """Put four convolutions of what is doubled, and their pixels in turn, in the place of one."""
    source = node.input_value(0).get_node().input_value(0)
    weights = _floats(node.input_value(1))
    assert weights is not None
    name, last = node.get_friendly_name(), node
    bias = bias_of(node, len(weights))
    phases = []
    for row, column in _PHASES:
        kernel = summed(summed(weights.astype(np.float32), row, 2), column, 3)
        constant: Any = ops.constant(kernel.astype(weights.dtype))
        if weights.dtype != np.float32:
            constant = ops.convert(constant, "f32")
        phase = ops.convolution(
            source, constant, [1, 1], [1 - row, 1 - column], [row, column], [1, 1]
        )
        phase.set_friendly_name(f"{name}{_MARK}{row}{column}")
        if bias is not None:  # the convolution's kernel adds it
            phase = ops.add(phase, bias.get_source_output())
            phase.set_friendly_name(f"{name}{_MARK}{row}{column}/bias")
        phases.append(phase)
    if bias is not None:
        last = bias.get_node()
    together = ops.concat(phases, 1)
    together.set_friendly_name(f"{name}{_MARK}s")
    result = ops.depth_to_space(together, "blocks_first", 2)
    result.set_friendly_name(last.get_friendly_name())
    last.output(0).replace(result.output(0))


def summed(weights: NDArray[np.float32], phase: int, axis: int) -> NDArray[np.float32]:
    """Return the two sums that the three weights along ``axis`` become for ``phase``.

    Of the two pixels that one becomes, the first (0) sees the pixel before once and its own twice,
    the second (1) its own twice and the next one once.
    """
    first, middle, last = np.split(weights, 3, axis)
    pair = (first, middle + last) if phase == 0 else (first + middle, last)
    return np.concatenate(pair, axis)
