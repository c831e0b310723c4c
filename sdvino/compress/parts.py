"""Where compression cuts a graph into parts, and the parts joined again.

Cuts are made behind additions of two activations, where a block adds its residual: such a sum
stays in float, so that quantizing part by part quantizes what quantizing the whole does. A part, a
stage of `sdvino.graph.cut`, is what the end of its block depends on and no earlier part holds.
Shapes cross too: OpenVINO's export computes one for all blocks of a size, and in Stable Diffusion
XL's UNet the way up reads those of the way down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.layers import PRODUCTS
from sdvino.graph.cut import Ports, Stages, result_name
from sdvino.graph.walk import is_constant, reshape_static

_FLOATS = ("f32", "f16", "bf16")
#: A shape that a later block takes from an earlier one: up to this many numbers.
_SHAPES, _RANK = ("i32", "i64"), 8
#: What hands values on: NNCF quantizes before it what is read behind it, so it is not parted from
#: its reader.
_PASSING = frozenset(
    {"Concat", "Convert", "Interpolate", "MaxPool", "Reshape", "Slice", "Split", "Squeeze"}
    | {"StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit"}
)
# NNCF's statistics hold weights in float32 as constants and packed by the plugin, and what a layer
# takes and gives in OpenVINO's tensors and in NumPy's.
_COPIES = 2
# A part is closed between this share of the limit and all of it, where the least crosses.
_CLOSE_FROM = 0.5
# Readers of the same input stay together while they hold no more than this share of all weights.
_SHARED = 0.1


def cut_at_ends(model: ov.Model, ends: Sequence[str]) -> Stages:
    """Cut ``model`` at the operations ``ends``: one at the end of every part but the last.

    ``ends`` are names of operations, each computed from the one before.
    """
    if not ends:
        return dict.fromkeys(model.get_ops(), 0)
    graph = _Graph(model)
    part: dict[int, int] = {}
    for index, end in enumerate(ends):
        for i in graph.behind(graph.index[end]):
            part.setdefault(i, index)
    part |= dict.fromkeys(graph.shared_readers(), 0)
    for i, kind in enumerate(graph.kinds):
        if kind == "Result":
            part[i] = part.get(graph.reads[i][0][0], len(ends))
    return {
        operation: part.get(i, len(ends))
        for i, operation in enumerate(graph.ops)
        if i not in graph.given
    }


def choose_ends(model: ov.Model, inputs: Mapping[str, NDArray[Any]], limit: int) -> tuple[str, ...]:
    """Return where to cut ``model``, so that quantizing a part takes ``limit`` bytes where it can.

    ``inputs`` are those of one evaluation: their shapes say what activations take. The libraries
    come on top. Nothing is returned for a model that fits as it is, and for one whose operations
    have no names of their own.
    """
    fixed = model.clone()
    reshape_static(fixed, {name: array.shape for name, array in inputs.items()})
    graph = _Graph(fixed)
    costs = [graph.cost(i) for i in range(len(graph.ops))]
    if sum(costs) <= limit or len(graph.index) < len(graph.ops):
        return ()
    candidates = []
    for i in graph.sums():
        behind = graph.behind(i)
        crossing = graph.crossing(behind)
        if crossing is not None:
            candidates.append(_Candidate(i, behind, sum(costs[j] for j in behind), crossing))
    return tuple(graph.names[i] for i in choose_chain(candidates, sum(costs), limit))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A place to cut: an operation, what it is computed from, what that costs, what crosses."""

    index: int
    behind: frozenset[int]
    cost: int
    crossing: int


def choose_chain(candidates: Sequence[_Candidate], total: int, limit: int) -> list[int]:
    """Return a chain of cuts that makes parts of ``total`` which cost ``limit`` where they can."""
    chosen: list[int] = []
    open_, done = list(candidates), 0
    while open_ and total - done > limit:
        fitting = [c for c in open_ if c.cost - done <= limit]
        close = [c for c in fitting if c.cost - done >= _CLOSE_FROM * limit]
        if close:
            best = min(close, key=lambda c: (c.crossing, -c.cost))
        elif fitting:
            best = max(fitting, key=lambda c: c.cost)
        else:
            best = min(open_, key=lambda c: c.cost)
        chosen.append(best.index)
        done, last = best.cost, best.index
        open_ = [c for c in open_ if c.cost > done and last in c.behind]
    return chosen


class Joiner:
    """Puts parts together, in order, in the place of what ``whole`` computes.

    ``whole`` keeps its inputs, outputs and what is noted in it.
    """

    def __init__(self, whole: ov.Model) -> None:
        """``whole`` is the graph as it was before it was cut; it is consumed."""
        self._whole = whole
        self._values: dict[str, Any] = {}
        self._names: Counter[str] = Counter()

    def add(self, part: ov.Model, ports: Ports) -> None:
        """Connect a part that has been changed inside since it was cut off."""
        for operation in part.get_ops():
            name = operation.get_friendly_name()
            self._names[name] += 1
            if self._names[name] > 1 and operation.get_type_name() not in ("Parameter", "Result"):
                operation.set_friendly_name(f"{name}.{self._names[name]}")
        for parameter in part.get_parameters():
            name = parameter.output(0).get_any_name()
            if name in ports.taken:
                source = self._values[name]
            else:
                source = self._whole.input(name).get_node().output(0)
            for port in parameter.output(0).get_target_inputs():
                port.replace_source_output(source)
        for name, result in zip(ports.given, part.get_results(), strict=True):
            self._values[name] = result.input(0).get_source_output()

    def finish(self) -> ov.Model:
        """Return the whole, computing as the parts do."""
        for index, result in enumerate(self._whole.get_results()):
            old = result.input(0).get_source_output()
            new = self._values[result_name(index)]
            new.get_tensor().add_names(old.get_names())
            result.input(0).replace_source_output(new)
        self._whole.validate_nodes_and_infer_types()
        return self._whole


class _Graph:
    """A model in numbers: walking over OpenVINO's own objects takes a hundred times longer."""

    def __init__(self, model: ov.Model) -> None:
        self.ops = model.get_ordered_ops()
        self.names = [op.get_friendly_name() for op in self.ops]
        self.kinds = [op.get_type_name() for op in self.ops]
        self.index = {name: i for i, name in enumerate(self.names)}
        #: Operation -> what it reads: operations, and which of their outputs.
        self.reads = [
            [
                (self.index[value.get_node().get_friendly_name()], value.get_index())
                for value in op.input_values()
            ]
            for op in self.ops
        ]
        #: Inputs, and operations that depend on constants alone.
        self.given: set[int] = set()
        constant: set[int] = set()
        for i, reads in enumerate(self.reads):
            if self.kinds[i] == "Parameter":
                self.given.add(i)
            elif all(j in constant for j, _ in reads):
                constant.add(i)
        self.given |= constant

    def behind(self, i: int) -> frozenset[int]:
        """Return ``i`` and what it is computed from, but for constants and inputs."""
        found, left = {i}, [i]
        while left:
            for j, _ in self.reads[left.pop()]:
                if j not in found and j not in self.given:
                    found.add(j)
                    left.append(j)
        return frozenset(found)

    def sums(self) -> Iterator[int]:
        """Give the additions of two activations: no biases."""
        for i, kind in enumerate(self.kinds):
            if kind == "Add" and not any(map(is_constant, self.ops[i].input_values())):
                yield i

    def shared_readers(self) -> list[int]:
        """Return the products of inputs with weights, and the additions of their biases.

        NNCF smooths all that read one input together. None are returned when they hold more than a
        small share of all weights, as in a UNet of 70 transformer blocks: then those of one part
        are smoothed together.
        """
        weights: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            own = sum(_bytes(v) for v in self.ops[i].input_values() if is_constant(v))
            if kind in PRODUCTS and own:
                weights[i] = own
                for j, _ in self.reads[i]:
                    if self.kinds[j] == "Parameter":
                        readers.setdefault(j, []).append(i)
        found = {i for those in readers.values() if len(those) > 1 for i in those}
        if sum(weights[i] for i in found) > _SHARED * sum(weights.values()):
            return []
        biases = [
            i
            for i, kind in enumerate(self.kinds)
            if kind == "Add" and all(j in found or j in self.given for j, _ in self.reads[i])
        ]
        return [*found, *biases]

    def crossing(self, behind: frozenset[int]) -> int | None:
        """Return the bytes that the rest reads of ``behind``; None where it is not to be cut."""
        values = {
            value
            for i, reads in enumerate(self.reads)
            if i not in behind
            for value in reads
            if value[0] in behind
        }
        outputs = {value: self.ops[value[0]].output(value[1]) for value in values}
        flowing = {value: out for value, out in outputs.items() if not _is_shape(out)}
        if any(self.kinds[i] in _PASSING for i, _ in flowing):
            return None
        if any(out.get_element_type().get_type_name() not in _FLOATS for out in flowing.values()):
            return None
        return sum(map(_bytes, outputs.values()))

    def cost(self, i: int) -> int:
        """Return the bytes that quantizing an operation takes: weights, what it takes and gives."""
        if self.kinds[i] not in PRODUCTS:
            return 0
        operation = self.ops[i]
        return _COPIES * sum(map(_bytes, [*operation.input_values(), operation.output(0)]))


def _is_shape(value: Any) -> bool:
    """Return whether a tensor is a few whole numbers: a shape, or part of one."""
    shape = value.get_partial_shape()
    return (
        value.get_element_type().get_type_name() in _SHAPES
        and shape.is_static
        and int(np.prod(shape.to_shape())) <= _RANK
    )


def _bytes(value: Any) -> int:
    """Return the bytes of a tensor in float32."""
    shape = value.get_partial_shape()
    return 0 if shape.is_dynamic else 4 * int(np.prod(shape.to_shape()))
