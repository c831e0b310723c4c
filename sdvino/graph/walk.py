"""Ways through a graph that several rewrites take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

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
