"""Exact rewrite: one graph becomes several, its stages, that are run in turn.

A rule says for each node to which stage it belongs; `keep_stage` makes a graph of one stage. Two
rules are here. `cut_at_skip` gives a UNet's shallow beginning, its deep middle and its shallow end
(DeepCache, arXiv:2312.00858: Ma et al. reuse the middle's features at the steps in between).
`cut_by_weight` gives pieces of about equal weights, of which only one need be in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import RequestError
from sdvino.graph.protocol import find_input
from sdvino.graph.walk import (
    constant_nodes,
    consumers,
    depending_on,
    drop_unused_inputs,
    needed_nodes,
    new_input,
)

#: The stages of `cut_at_skip`.
BEGINNING, DEEP, END = 0, 1, 2
#: Node -> number of its stage. Inputs, and what comes of constants alone, belong to every one.
Stages = Mapping[ov.Node, int]
#: A value of a graph: the name of the operation that makes it, and which of its outputs.
Value = tuple[str, int]
#: How far from equal weights a cut may be moved to where little crosses it, as a share of a piece.
_SLACK = 0.25


@dataclass(frozen=True, slots=True)
class Ports:
    """How one stage is joined to the others."""

    #: Name of an input -> the value of another stage that it stands for.
    taken: Mapping[str, Value]
    #: What its outputs are called elsewhere, in order: as the others take them, or `result_name`.
    given: tuple[str, ...]


def cut_at_skip(model: ov.Model, branch: int = 0) -> Stages:
    """Cut the UNet ``model`` where its main path meets a skip connection again.

    ``branch`` counts the skip connections from the outermost. The deep stage is what only the
    main path into that meeting needs. Raises RequestError when there are fewer.
    """
    joins = _joins(model)
    if branch >= len(joins):
        raise RequestError(
            f"The UNet has {len(joins)} skip connections, so there is no number {branch}; give a"
            f" cache branch from 0 to {len(joins) - 1}."
        )
    join = joins[branch]
    everywhere = _everywhere(model)
    shallow = needed_nodes(model, join) - everywhere
    after = depending_on(model, [join])
    return {
        node: (END if node in after else BEGINNING) if node in shallow else DEEP
        for node in model.get_ordered_ops()
        if node not in everywhere
    }


def cut_by_weight(model: ov.Model, count: int) -> Stages:
    """Cut ``model`` into up to ``count`` pieces of about the same bytes of weights."""
    everywhere = _everywhere(model)
    order = [node for node in model.get_ordered_ops() if node not in everywhere]
    weights = np.cumsum(_weights(order, everywhere))
    crossing = _crossing_bytes(order)
    piece = weights[-1] / count
    cuts = [-1]
    for number in range(1, count):
        free = np.arange(cuts[-1] + 1, len(order) - 1)
        if not len(free):
            break
        off = np.abs(weights[free] - number * piece)
        places = free[off <= max(_SLACK * piece, off.min())]
        cuts.append(int(places[np.argmin(crossing[places])]))
    numbers = np.searchsorted(np.array(cuts[1:], int), np.arange(len(order)))
    return dict(zip(order, numbers.tolist(), strict=True))


def keep_stage(model: ov.Model, stages: Stages, number: int) -> Ports:
    """Make of ``model``, in place, its stage ``number``; exact.

    Tensors that pass from one stage to another are outputs of the first and inputs of the second,
    of their own type and named alike: the pool of names and arrays that stages are run on is
    theirs. The names are the same for every copy of the model.
    """
    order = {node: i for i, node in enumerate(model.get_ordered_ops())}
    crossing: dict[tuple[ov.Node, int], str] = {}
    read: list[tuple[ov.Input, ov.Output]] = []
    for node in order:
        if node not in stages:
            continue
        for target in node.inputs():
            source = target.get_source_output()
            if stages.get(source.get_node(), stages[node]) == stages[node]:
                continue
            origin = _unrounded(source)
            if origin.get_node() in stages:
                key = (origin.get_node(), origin.get_index())
                crossing[key] = f"cut.{order[key[0]]}.{key[1]}"
            if stages[node] == number:
                read.append((target, source))
    made = {key: name for key, name in crossing.items() if stages[key[0]] == number}
    given = _keep_results(model, stages, number, made)
    taken = _feed(model, read, crossing, stages, number)
    drop_unused_inputs(model)
    model.validate_nodes_and_infer_types()
    return Ports(taken, given)


def split(model: ov.Model, cut: Callable[[ov.Model], Stages]) -> list[tuple[ov.Model, Ports]]:
    """Return every stage of ``model`` as a model; they share its weights. ``model`` is consumed."""
    count = stage_count(cut(model))
    if count == 1:
        return [(model, keep_stage(model, cut(model), 0))]
    for node in model.get_ops():  # copies have other names where nobody gave one
        node.set_friendly_name(node.get_friendly_name())
    copies = [model.clone() for _ in range(count)]
    return [(copy, keep_stage(copy, cut(copy), number)) for number, copy in enumerate(copies)]


def stage_count(stages: Stages) -> int:
    """Return how many stages there are."""
    return max(stages.values()) + 1


def result_name(index: int) -> str:
    """Return what `Ports.given` calls an output of the whole graph."""
    return f"result.{index}"


def _keep_results(
    model: ov.Model, stages: Stages, number: int, made: Mapping[tuple[ov.Node, int], str]
) -> tuple[str, ...]:
    kept = []
    for index, result in enumerate(model.get_results()):
        if stages[result] == number:
            kept.append(result_name(index))
        else:
            model.remove_result(result)
    results = []
    for (node, index), name in made.items():
        node.output(index).add_names({name})
        results.append(ops.result(node.output(index)))
    model.add_results(results)
    return (*kept, *made.values())


def _feed(
    model: ov.Model,
    read: Iterable[tuple[ov.Input, ov.Output]],
    crossing: Mapping[tuple[ov.Node, int], str],
    stages: Stages,
    number: int,
) -> dict[str, Value]:
    """Give the inputs of stage ``number`` what comes from the others; return what that is."""
    inputs: dict[str, ov.Node] = {}
    taken: dict[str, Value] = {}
    rounded: dict[tuple[ov.Node, int], ov.Output] = {}
    for target, source in read:
        key = (source.get_node(), source.get_index())
        if key not in rounded:
            origin = _unrounded(source)
            fed = origin
            if stages.get(origin.get_node(), number) != number:
                name = crossing[origin.get_node(), origin.get_index()]
                if name not in inputs:
                    inputs[name] = new_input(origin, name)
                    taken[name] = origin.get_node().get_friendly_name(), origin.get_index()
                fed = inputs[name].output(0)
            if origin != source:  # 8-bit kernels need the rounding beside them
                ranges = source.get_node().input_values()[1:]
                levels = source.get_node().get_attributes()["levels"]
                fed = ops.fake_quantize(fed, *ranges, levels).output(0)
            rounded[key] = fed
        target.replace_source_output(rounded[key])
    model.add_parameters(list(inputs.values()))
    return taken


def _unrounded(port: ov.Output) -> ov.Output:
    """Return ``port``, or what it rounds where it is a fake quantization."""
    node = port.get_node()
    return node.input_value(0) if node.get_type_name() == "FakeQuantize" else port


def _everywhere(model: ov.Model) -> set[ov.Node]:
    return constant_nodes(model) | set(model.get_parameters())


def _joins(model: ov.Model) -> list[ov.Node]:
    """Return the concatenations of feature maps and skip connections, the outermost first."""
    pictures = depending_on(model, [find_input(model, "sample").get_node()])
    found = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Concat"
        and node.get_attributes()["axis"] in (1, -3)
        and len(node.inputs()) == 2
        and all(source.get_node() in pictures for source in node.input_values())
        and node.get_output_partial_shape(0).rank.get_length() == 4
    ]
    return found[::-1]


def _weights(order: Iterable[ov.Node], everywhere: set[ov.Node]) -> list[int]:
    """Return the bytes of the constants behind each node, each constant counted once."""
    seen: set[ov.Node] = set()

    def bytes_behind(node: ov.Node) -> int:
        if node in seen or node not in everywhere:
            return 0
        seen.add(node)
        own = int(node.get_byte_size()) if node.get_type_name() == "Constant" else 0
        return own + sum(bytes_behind(source.get_node()) for source in node.input_values())

    return [sum(bytes_behind(s.get_node()) for s in node.input_values()) for node in order]


def _crossing_bytes(order: list[ov.Node]) -> NDArray[np.float64]:
    """Return how many bytes pass a cut after each node of ``order``."""
    position = {node: i for i, node in enumerate(order)}
    change = np.zeros(len(order) + 1)
    for i, node in enumerate(order):
        for port in node.outputs():
            last = max((position.get(reader, i) for reader in consumers(port)), default=i)
            shape = port.get_partial_shape()
            size = float(np.prod(shape.get_shape())) if shape.is_static else 1.0
            change[i] += size * port.get_element_type().size
            change[last] -= size * port.get_element_type().size
    alive: NDArray[np.float64] = np.cumsum(change)[:-1]
    return alive
