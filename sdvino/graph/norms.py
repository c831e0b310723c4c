"""Exact rewrite: a group norm becomes means over channels, a scale and a shift.

OpenVINO's CPU plugin normalizes groups in planes, while its convolutions keep channels last: two
reorders of the whole tensor for each norm. A mean over the pixels of each channel is taken as the
channels lie; joining those of a group takes a handful of numbers, and the scale and shift merge
with the activation that follows.
"""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from openvino import opset13 as ops

#: Numbers in the largest tensor that is rewritten, 4 MB of floats. Larger ones do not stay in a
#: core's cache from one pass to the next: nothing is gained, and each pass would take their memory.
LARGEST = 1 << 20


def group_norms_to_channels(model: ov.Model, largest: int = LARGEST) -> int:
    """Rewrite every group norm of at most ``largest`` float32 numbers [N, C, ...], in place; exact.

    Needs fixed shapes. Mean first, then the squares of what differs from it, so that a large mean
    costs no digits. Returns how many were rewritten; others stay as they are.
    """
    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "GroupNormalization" and _fits(node, largest):
            name = node.get_friendly_name()
            result = _by_channel(node)
            result.set_friendly_name(name)
            node.output(0).replace(result.output(0))
            done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _fits(node: ov.Node, largest: int) -> bool:
    source = node.input_value(0)
    shape = source.get_partial_shape()
    return (
        source.get_element_type() == ov.Type.f32
        and shape.is_static
        and len(shape) > 2
        and math.prod(source.get_shape()) <= largest
    )


def _by_channel(node: ov.Node) -> ov.Node:
    """Return what the group norm ``node`` computes."""
    source, weight, bias = node.input_values()
    how = node.get_attributes()
    groups, epsilon = int(how["num_groups"]), np.float32(how["epsilon"])
    batch, channels, *sides = source.get_shape()
    pixels = list(range(2, 2 + len(sides)))
    grouped = [batch, groups, channels // groups]
    flat = [1] * len(sides)

    def mean(port: ov.Output | ov.Node) -> ov.Node:
        """Return the mean over each group, for each of its channels: [N, C, 1, ...]."""
        of_channels = ops.reshape(ops.reduce_mean(port, pixels, True), grouped, False)
        of_groups = ops.broadcast(ops.reduce_mean(of_channels, [2], True), grouped)
        return ops.reshape(of_groups, [batch, channels, *flat], False)

    def by_channel(port: ov.Output) -> ov.Node:
        return ops.reshape(port, [1, channels, *flat], False)

    middle = mean(source)
    apart = ops.subtract(source, middle)
    variance = mean(ops.multiply(apart, apart))
    scale = ops.divide(by_channel(weight), ops.sqrt(ops.add(variance, epsilon)))
    shift = ops.subtract(by_channel(bias), ops.multiply(middle, scale))
    return ops.add(ops.multiply(source, scale), shift)
