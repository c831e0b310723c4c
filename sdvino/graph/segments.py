"""Exact rewrite: one graph becomes several that are run in turn.

Two ways to cut. `cut_at_skip` gives a UNet's shallow beginning, its deep middle and its shallow end
(DeepCache, arXiv:2312.00858: Ma et al. reuse the middle's features at the steps in between).
`cut_by_weight` gives pieces of about equal weights, of which only one need be in memory at a time.
Both say for each node to which segment it belongs; `keep_segment` makes a graph of one segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError, RequestError
from sdvino.graph.protocol import find_input
from sdvino.graph.walk import (
    constant_nodes,
    consumers,
    depending_on,
    drop_unused_inputs,
    needed_nodes,
    new_input,
)

#: The segments of `cut_at_skip`.
BEGINNING, DEEP, END = 0, 1, 2
#: Node -> number of its segment. Inputs, and what comes of constants alone, belong to every one.
Segments = Mapping[ov.Node, int]
#: How far from equal weights a cut may be moved to where little crosses it, as a share of a piece.
_SLACK = 0.25


def cut_at_skip(model: ov.Model, branch: int = 0) -> Segments:
    """Cut the UNet ``model`` where its main path meets a skip connection again.

    ``branch`` counts the skip connections from the outermost. The deep segment is what only the
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


def cut_by_weight(model: ov.Model, count: int) -> Segments:
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


def keep_segment(model: ov.Model, segments: Segments, number: int) -> None:
    """Make of ``model``, in place, its segment ``number``; exact.

    Tensors that pass from one segment to another are outputs of the first and inputs of the second,
    float32 and named alike: the pool of names and arrays that the segments are run on is theirs.
    """
    order = {node: i for i, node in enumerate(model.get_ordered_ops())}
    crossing: dict[tuple[ov.Node, int], str] = {}
    read: list[tuple[ov.Input, ov.Output]] = []
    for node in order:
        if node not in segments:
            continue
        for target in node.inputs():
            source = target.get_source_output()
            if segments.get(source.get_node(), segments[node]) == segments[node]:
                continue
            origin = _unrounded(source)
            if origin.get_node() in segments:
                key = (origin.get_node(), origin.get_index())
                crossing[key] = f"cut.{order[key[0]]}.{key[1]}"
            if segments[node] == number:
                read.append((target, source))
    made = {key: name for key, name in crossing.items() if segments[key[0]] == number}
    _keep_results(model, segments, number, made)
    _feed(model, read, crossing, segments, number)
    drop_unused_inputs(model)
    model.validate_nodes_and_infer_types()


def names_in_pool(inputs: Iterable[Iterable[str]], pool: Mapping[str, object]) -> list[str]:
    """Return for each input of a segment, given by all its names, the one that ``pool`` knows.

    Raises ModelFolderError for an input that nothing gives.
    """
    known = [next((name for name in sorted(names) if name in pool), None) for names in inputs]
    if None in known:
        raise ModelFolderError(
            "The graph of the unet has an input of a name that none has; get the model again."
        )
    return [name for name in known if name is not None]


def segment_count(segments: Segments) -> int:
    """Return how many segments there are."""
    return max(segments.values()) + 1


def _keep_results(
    model: ov.Model, segments: Segments, number: int, made: Mapping[tuple[ov.Node, int], str]
) -> None:
    for result in model.get_results():
        if segments[result] != number:
            model.remove_result(result)
    results = []
    for (node, index), name in made.items():
        node.output(index).add_names({name})
        results.append(ops.result(node.output(index)))
    model.add_results(results)


def _feed(
    model: ov.Model,
    read: Iterable[tuple[ov.Input, ov.Output]],
    crossing: Mapping[tuple[ov.Node, int], str],
    segments: Segments,
    number: int,
) -> None:
    """Give the inputs of segment ``number`` what comes from the others."""
    inputs: dict[str, ov.Node] = {}
    rounded: dict[tuple[ov.Node, int], ov.Output] = {}
    for target, source in read:
        key = (source.get_node(), source.get_index())
        if key not in rounded:
            origin = _unrounded(source)
            fed = origin
            if segments.get(origin.get_node(), number) != number:
                name = crossing[origin.get_node(), origin.get_index()]
                if name not in inputs:
                    inputs[name] = new_input(origin, name)
                fed = inputs[name].output(0)
            if origin != source:  # 8-bit kernels need the rounding beside them
                ranges = source.get_node().input_values()[1:]
                levels = source.get_node().get_attributes()["levels"]
                fed = ops.fake_quantize(fed, *ranges, levels).output(0)
            rounded[key] = fed
        target.replace_source_output(rounded[key])
    model.add_parameters(list(inputs.values()))


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
