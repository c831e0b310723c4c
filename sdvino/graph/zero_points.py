"""Exact rewrite: convolutions of 8-bit numbers whose zero is not 0 take them as they are.

An activation as SiLU's reaches a little below 0, so that its zero is some number z of 0 ... 255.
OpenVINO gives z to the convolution's kernel, and so adds up every weight at every load: half of a
second start. Here the picture is padded with z, the kernel is told of no zero, and what z adds to
every pixel, z times the sum of the weights, comes off the bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.graph.walk import bias_of, consumers, stored_constant

_LEVELS = 256
#: What -128 ... 127 has for its zero; OpenVINO stores it as signed numbers, which need none.
_SIGNED = 128
#: How far from a whole number, in steps, the zero may lie.
_WHOLE = 1e-3
#: Only the order of the numbers changes between a quantizer and a convolution of one pixel.
_REORDERING = ("Reshape", "Transpose")


@dataclass(frozen=True, slots=True)
class _Rounding:
    """What a quantizer does: x becomes ``step`` (q - ``zero``), q whole, 0 to 255."""

    low: float
    high: float
    step: float
    zero: int


def zero_points_to_biases(model: ov.Model) -> int:
    """Take the zero points out of every 8-bit convolution that has one, in place; exact.

    Its weights are a constant of int8 [O, I, H, W] times a scale for all or for each O; a bias may
    follow. Returns how many convolutions were rewritten; those in another form stay as they are,
    and so do all that read the same numbers.
    """
    done = 0
    for node in model.get_ordered_ops():
        rounding = _rounding(node)
        if rounding is None:
            continue
        readers = list(_readers(node))
        if readers and all(_is_known(reader, direct) for reader, direct in readers):
            _rewrite(node, rounding, [reader for reader, _ in readers])
            done += len(readers)
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _rounding(node: ov.Node) -> _Rounding | None:
    """Return what ``node`` does; None unless it quantizes to unsigned numbers with a zero."""
    if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != _LEVELS:
        return None
    limits = [_number(port) for port in node.input_values()[1:]]
    low, high = limits[:2]
    if low is None or high is None or limits[2:] != [low, high] or not low < 0 < high:
        return None
    step = (high - low) / (_LEVELS - 1)
    zero = round(-low / step)
    if zero in (0, _SIGNED) or abs(-low / step - zero) > _WHOLE:
        return None
    return _Rounding(low, high, step, zero)


def _number(port: ov.Output) -> float | None:
    node = port.get_node()
    if node.get_type_name() != "Constant" or int(np.prod(port.get_shape())) != 1:
        return None
    return float(node.get_data().reshape(())[()])


def _readers(node: ov.Node, direct: bool = True) -> Iterator[tuple[ov.Node, bool]]:
    """Yield what reads ``node``, in another order perhaps, and whether it does so directly."""
    for reader in consumers(node.output(0)):
        if reader.get_type_name() in _REORDERING:
            yield from _readers(reader, False)
        else:
            yield reader, direct


def _is_known(node: ov.Node, direct: bool) -> bool:
    if node.get_type_name() != "Convolution" or _weights(node) is None:
        return False
    how = node.get_attributes()
    return how["auto_pad"] == "explicit" and (direct or not _pads(node))


def _pads(node: ov.Node) -> tuple[list[int], list[int]] | None:
    """Return the rows and columns that ``node`` adds before and behind; None for none."""
    how = node.get_attributes()
    before, behind = list(how["pads_begin"]), list(how["pads_end"])
    return (before, behind) if any([*before, *behind]) else None


def _weights(node: ov.Node) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Return the 8-bit weights of a convolution and their scales [O] or [1]; None otherwise."""
    product = node.input_value(1).get_node()
    if product.get_type_name() != "Multiply":
        return None
    converted, scales = (port.get_node() for port in product.input_values())
    if converted.get_type_name() != "Convert" or scales.get_type_name() != "Constant":
        return None
    numbers = converted.input_value(0).get_node()
    shape = list(scales.get_output_shape(0))
    if (
        numbers.get_type_name() != "Constant"
        or numbers.get_element_type() != ov.Type.i8
        or scales.get_element_type() != ov.Type.f32
        or int(np.prod(shape)) not in (1, *shape[:1])
    ):
        return None
    return numbers.get_data(), scales.get_data().reshape(-1)


def _rewrite(node: ov.Node, rounding: _Rounding, convolutions: list[ov.Node]) -> None:
    """Let ``convolutions`` read what the quantizer ``node`` makes without its zero."""
    source, *limits = node.input_values()
    step = ops.constant(np.float32(rounding.step))
    whole = ops.fake_quantize(
        source, *limits[:2], ops.constant(np.float32(0)), np.float32(_LEVELS - 1), _LEVELS
    )
    whole.set_friendly_name(node.get_friendly_name())
    numbers = ops.convert(whole, "u8")
    zero = ops.constant(np.uint8(rounding.zero))
    padded: dict[str, ov.Output] = {}
    for convolution in convolutions:
        pads = _pads(convolution)
        if pads is None:
            _add_to_bias(convolution, rounding)
            continue
        if str(pads) not in padded:
            before, behind = ([0, 0, *sides] for sides in pads)
            picture = ops.pad(numbers, before, behind, "constant", zero)
            picture.set_friendly_name(f"{convolution.get_friendly_name()}/padded")
            padded[str(pads)] = ops.multiply(ops.convert(picture, "f32"), step).output(0)
        _replace(convolution, padded[str(pads)], rounding)
    plain = ops.multiply(ops.convert(numbers, "f32"), step)
    node.output(0).replace(plain.output(0))


def _replace(node: ov.Node, source: ov.Output, rounding: _Rounding) -> None:
    """Put a convolution of the padded ``source`` in the place of ``node``."""
    how = node.get_attributes()
    none = [0] * len(how["pads_begin"])
    result = ops.convolution(
        source, node.input_value(1), how["strides"], none, none, how["dilations"]
    )
    result.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(result.output(0))
    _add_to_bias(result, rounding)


def _add_to_bias(node: ov.Node, rounding: _Rounding) -> None:
    """Add to the convolution ``node`` what its numbers lack, by its bias where it has one."""
    known = _weights(node)
    assert known is not None
    weights, scales = known
    sums = weights.reshape(len(weights), -1).sum(1, dtype=np.int32)
    lacking = (rounding.low * sums * scales.astype(np.float64)).reshape(1, -1, 1, 1)
    bias = bias_of(node, len(weights))
    values = None if bias is None else stored_constant(bias.get_source_output())
    if bias is not None and values is not None:
        total = ops.constant((values.get_data() + lacking).astype(np.float32))
        bias.replace_source_output(total.output(0))
        return
    targets, names = node.output(0).get_target_inputs(), node.output(0).get_names()
    together = ops.add(node, ops.constant(lacking.astype(np.float32)))
    for target in targets:
        target.replace_source_output(together.output(0))
    node.output(0).set_names(set())
    together.output(0).set_names(names)
