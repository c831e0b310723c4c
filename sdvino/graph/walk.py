"""What several rewrites do with a graph: walk through it, fix its shapes, look at its constants."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.protocol import find_input

#: Operations between a stored weight and its use: conversion, zero point, scale, shape.
_WEIGHT_DEPTH = 6


def freeze_shapes(model: ov.Model) -> None:
    """Replace every ``ShapeOf`` of a fixed shape by that shape, in place; exact.

    What computes with shapes alone is then no longer tied to the tensors whose shapes they are.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ShapeOf":
            continue
        shape = node.input_value(0).get_partial_shape()
        if shape.is_static:
            dtype = node.get_output_element_type(0).to_dtype()
            fixed = ops.constant([dimension.get_length() for dimension in shape], dtype)
            node.output(0).replace(fixed.output(0))
    model.validate_nodes_and_infer_types()


def depending_on(model: ov.Model, sources: Iterable[ov.Node]) -> set[ov.Node]:
    """Return the nodes that ``sources`` reach, themselves included."""
    found = set(sources)
    for node in model.get_ordered_ops():
        if node not in found and any(s.get_node() in found for s in node.input_values()):
            found.add(node)
    return found


def constant_nodes(model: ov.Model) -> set[ov.Node]:
    """Return the constants and what is computed from constants alone."""
    found: set[ov.Node] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            continue
        if all(source.get_node() in found for source in node.input_values()):
            found.add(node)
    return found


def is_constant(port: ov.Output, depth: int = _WEIGHT_DEPTH) -> bool:
    """Return whether ``port`` is a weight: computed from constants alone, in a few operations."""
    node = port.get_node()
    sources = node.input_values()
    if node.get_type_name() == "Parameter" or (sources and depth == 0):
        return False
    return all(is_constant(source, depth - 1) for source in sources)


def stored_constant(port: ov.Output) -> ov.Node | None:
    """Return the constant that ``port`` is, as it is or converted; None where it is no constant."""
    node = port.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def bias_of(node: ov.Node, channels: int | None = None) -> ov.Input | None:
    """Return which input of the only reader of ``node`` is a constant that it adds; None for none.

    With ``channels`` alone one of the shape [1, C, 1, 1], as convolutions have it.
    """
    readers = consumers(node.output(0))
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    for port in readers[0].inputs():
        value = port.get_source_output()
        if is_constant(value) and (
            channels is None or list(value.get_shape()) == [1, channels, 1, 1]
        ):
            return port
    return None


def by_name(model: ov.Model) -> dict[str, ov.Node]:
    """Return the operations of ``model`` by name."""
    return {op.get_friendly_name(): op for op in model.get_ops()}


def view_constant(node: ov.Node, values: NDArray[Any]) -> ov.Output:
    """Return a constant of ``values``, a contiguous view of the data of the constant ``node``.

    They are read where they lie, in the mapped file, and not copied.
    """
    # OpenVINO shares writable arrays alone, so this view says it is one; nobody writes.
    memory: Any = (ctypes.c_uint8 * values.nbytes).from_address(values.ctypes.data)
    memory.owner = node, values
    shared: NDArray[Any] = np.frombuffer(memory, values.dtype).reshape(values.shape)
    return ops.constant(shared, shared_memory=True).output(0)


def consumers(port: ov.Output) -> list[ov.Node]:
    """Return the nodes that read ``port``, each as often as it does."""
    return [target.get_node() for target in port.get_target_inputs()]


def keep_outputs(model: ov.Model, wanted: dict[str, ov.Output]) -> None:
    """Make the ports of ``wanted`` the only outputs, under those names; inputs without use go."""
    for result in model.get_results():
        model.remove_result(result)
    results = []
    for name, port in wanted.items():
        port.add_names({name})
        results.append(ops.result(port))
    model.add_results(results)
    drop_unused_inputs(model)
    model.validate_nodes_and_infer_types()


def needed_nodes(model: ov.Model, besides: ov.Node | None = None) -> set[ov.Node]:
    """Return what the outputs depend on, not counting the first input of ``besides``."""
    waiting: list[ov.Node] = list(model.get_results())
    needed: set[ov.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            sources = node.input_values()
            waiting += [s.get_node() for s in (sources[1:] if node == besides else sources)]
    return needed


def drop_unused_inputs(model: ov.Model) -> None:
    """Remove the inputs that no output depends on."""
    needed = needed_nodes(model)
    for parameter in model.get_parameters():
        if parameter not in needed:
            model.remove_parameter(parameter)


def new_input(port: ov.Output, name: str) -> ov.Node:
    """Return an input called ``name`` of the type and shape of ``port``."""
    parameter = ops.parameter(port.get_partial_shape(), port.get_element_type(), name=name)
    parameter.output(0).set_names({name})
    return parameter


def reshape_static(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the inputs of ``model`` named in ``shapes`` fixed shapes, in place; exact.

    For a UNet: ``sample`` [B, C, h, w], ``encoder_hidden_states`` [B, 77, D], ``timestep`` [1] or
    []; a shape that differs from the input's own rank only by a leading 1 is fitted to it.
    Raises ModelFolderError for an input that is not there or a shape that the graph does not take.
    """
    wanted: dict[ov.Output, ov.PartialShape] = {}
    for name, shape in shapes.items():
        port = find_input(model, name)
        wanted[port] = ov.PartialShape(_fit(port.get_partial_shape(), list(shape)))
    try:
        model.reshape(wanted)
    except RuntimeError as error:
        text = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ModelFolderError(
            f"The model does not take inputs of the shapes {text};"
            " its files do not fit what its configuration says."
        ) from error


def _fit(declared: ov.PartialShape, shape: list[int]) -> list[int]:
    """Add or drop a leading 1 where the graph declares a scalar as [1], or [1] as a scalar."""
    if declared.rank.is_dynamic:
        return shape
    rank = declared.rank.get_length()
    if rank == 1 and not shape:
        return [1]
    if rank == 0 and shape == [1]:
        return []
    return shape


#: Elements that operations on constants alone may add to what is in the file: 256 MB of floats.
#: Stable Diffusion's graphs add a few thousand (masks, positions, frequencies).
MOST_ADDED = 2**26


def check_folding(model: ov.Model, name: str) -> None:
    """Raise ModelFolderError when ``model`` would fill the memory before it has been given a thing.

    OpenVINO computes what depends on constants alone once, and keeps it: a Broadcast or Tile of one
    number, a few bytes of XML, can become any number of gigabytes. ``name`` is the component's.
    """
    known: set[str] = set()
    added = 0
    for node in model.get_ordered_ops():
        count = node.get_input_size()
        kind = node.get_type_name()
        if kind == "Constant" or (kind == "ShapeOf" and node.get_input_partial_shape(0).is_static):
            known.add(node.get_name())
        elif count and all(
            node.input_value(i).get_node().get_name() in known for i in range(count)
        ):
            known.add(node.get_name())
            sources = node.input_values()
            given = max(_elements(source) for source in sources)
            added += sum(max(0, _elements(output) - given) for output in node.outputs())
            if added > MOST_ADDED:
                raise ModelFolderError(
                    f"The graph of the {name} makes constants of over {MOST_ADDED:,} numbers out of"
                    " small ones, which no model does; get the model again."
                )


def _elements(output: ov.Output) -> int:
    shape = output.get_partial_shape()
    return math.prod(shape.to_shape()) if shape.is_static else 0
