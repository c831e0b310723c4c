"""What activations are like, by channel: all that quantizing asks of them, from one evaluation.

SmoothQuant asks for the largest magnitude of every channel, the ranges of activations for the least
and the greatest value of each evaluation, and correcting biases for the means. Where a channel is
scaled, its numbers are scaled with it. So while pictures are drawn to calibrate on, the graph gives
these few numbers of everything that a product reads, and nothing has to be evaluated again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.layers import CONVOLUTIONS
from sdvino.errors import SdvinoError
from sdvino.graph.cut import Value
from sdvino.graph.protocol import find_input
from sdvino.graph.walk import freeze_shapes, is_constant

Array = NDArray[np.float32]
#: The output that holds them.
STATISTICS = "statistics"
#: Least, greatest and mean value.
_KINDS = 3
#: Products of activations, and what NNCF quantizes in front of: one range for all channels.
_WITHOUT_CHANNELS = ("ScaledDotProductAttention", "MatMul", "Interpolate")


@dataclass(frozen=True, slots=True)
class Point:
    """One value that is measured."""

    name: str
    port: int
    #: Of the value where it is measured; 0 for sides that are only known when it runs.
    shape: tuple[int, ...]
    #: Which axis holds the channels; None: all are measured together.
    axis: int | None
    #: Where its channels begin among those of all values.
    start: int

    @property
    def value(self) -> Value:
        """Return which value of the graph it is."""
        return self.name, self.port

    @property
    def channels(self) -> int:
        """Return how many channels are measured."""
        return 1 if self.axis is None else self.shape[self.axis]


@dataclass(frozen=True, slots=True)
class Channels:
    """What one value is like."""

    #: Least and greatest value of each channel in each evaluation, [evaluations, channels].
    low: Array
    high: Array
    #: Of each channel, over all evaluations.
    mean: Array
    #: The axis of the value that holds the channels; 0 where all are one.
    axis: int = 0
    #: Of the value, where it was measured; 0 for sides that were not known before.
    shape: tuple[int, ...] = ()

    def scaled(self, factors: Array) -> Channels:
        """Return what the value is like with its channels multiplied by positive ``factors``."""
        return replace(
            self, low=self.low * factors, high=self.high * factors, mean=self.mean * factors
        )


def fix_shapes(model: ov.Model, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Give the inputs of ``model`` the shapes of ``inputs``, in place; exact.

    Unlike `ov.Model.reshape` this takes no operation between products out of the graph: they still
    read what they read before. What computes with shapes becomes constant.
    """
    for name, array in inputs.items():
        parameter: Any = find_input(model, name).get_node()
        scalar = parameter.get_partial_shape().rank == ov.Dimension(0)
        parameter.set_partial_shape(ov.PartialShape([] if scalar else list(array.shape)))
    model.validate_nodes_and_infer_types()
    freeze_shapes(model)


def read_by_products(model: ov.Model) -> dict[ov.Output, int | None]:
    """Return the values that products read, and the axis of their channels.

    Without channels (None) are those that attention multiplies with each other. Weights are none.
    """
    found: dict[ov.Output, int | None] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        values = node.input_values()
        if kind in CONVOLUTIONS and is_constant(values[1]):
            found[values[0]] = 1
        elif kind == "MatMul" and any(map(is_constant, values[:2])):
            port = 1 if is_constant(values[0]) else 0
            transposed = node.get_attributes()[f"transpose_{'ab'[port]}"]
            rank = values[port].get_partial_shape().rank.get_length()
            axis = max(0, rank - (1 if transposed == bool(port) else 2))
            found[values[port]] = axis
        elif kind in _WITHOUT_CHANNELS:
            count = 1 if kind == "Interpolate" else 2
            for value in values[:count]:
                found.setdefault(value, None)
    return {value: axis for value, axis in found.items() if not is_constant(value)}


def add_statistics(
    model: ov.Model, crossing: Mapping[str, Value], known: Iterable[Point]
) -> list[Point]:
    """Give ``model`` an output `STATISTICS` of what its products read is like.

    It is the last one, [3 x channels]: of one point after the other the least values, the greatest
    and the means. ``crossing`` says which values its inputs stand for. Returns the points; those
    that are ``known`` are not measured again.
    """
    known = list(known)
    seen = {point.value for point in known}
    start = sum(point.channels for point in known)
    points: list[Point] = []
    measured: list[ov.Output] = []
    for source, axis in read_by_products(model).items():
        value = value_of(source, crossing)
        if value in seen:
            continue
        seen.add(value)
        shape = tuple(
            side.get_length() if side.is_static else 0 for side in source.get_partial_shape()
        )
        points.append(Point(*value, shape, axis, start))
        start += points[-1].channels
        others = np.array([i for i in range(len(shape)) if i != axis], np.int64)
        flat = np.array([-1], np.int64)
        measured += [
            ops.reshape(reduce(source, others, False), flat, False).output(0)
            for reduce in (ops.reduce_min, ops.reduce_max, ops.reduce_mean)
        ]
    if points:
        together: Any = ops.concat(measured, 0)
        together.output(0).set_names({STATISTICS})
        model.add_results([ops.result(together)])
        model.validate_nodes_and_infer_types()
    return points


def value_of(source: ov.Output, crossing: Mapping[str, Value]) -> Value:
    """Return which value of the whole graph ``source`` is in a part of it."""
    node = source.get_node()
    if node.get_type_name() == "Parameter":
        name = source.get_any_name()
        return crossing.get(name, (name, 0))
    return node.get_friendly_name(), source.get_index()


class Recorder:
    """Writes the statistics of evaluations to a file, a row each: 3 x channels, float32."""

    def __init__(self, path: Path) -> None:
        """``path`` is the file to write; what its rows hold goes beside it, as .json."""
        self._path = path
        path.write_bytes(b"")
        self.points: list[Point] = []
        self._evaluations = 0

    def rows(self, count: int) -> Array:
        """Return rows for ``count`` more evaluations: a part of the file, to be let go of soon."""
        width = _width(self.points)
        begin = 4 * self._evaluations * width
        self._evaluations += count
        return np.memmap(self._path, np.float32, "r+", begin, (count, width))

    def close(self) -> Statistics:
        """Finish the files, and return what they hold."""
        index = {
            "evaluations": self._evaluations,
            "points": [asdict(point) for point in self.points],
        }
        _index(self._path).write_text(json.dumps(index), encoding="utf-8")
        return Statistics(self._path)


class Statistics:
    """What the values of a graph are like; read from the disk when it is asked for."""

    def __init__(self, path: Path, rows: Sequence[int] | None = None) -> None:
        """``path`` is what a `Recorder` wrote; ``rows``: of these evaluations alone.

        Raises SdvinoError for another file.
        """
        try:
            index = json.loads(_index(path).read_text(encoding="utf-8"))
            points = [
                Point(**{**entry, "shape": tuple(entry["shape"])}) for entry in index["points"]
            ]
            shape = (int(index["evaluations"]), _width(points))
            if path.stat().st_size != 4 * shape[0] * shape[1]:
                raise ValueError("The file has another size.")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SdvinoError(
                f"The statistics in {path.name} cannot be read; convert again from the start."
            ) from error
        self._path, self._shape = path, shape
        self._rows = list(range(shape[0])) if rows is None else list(rows)
        self._points = {point.value: point for point in points}

    @property
    def evaluations(self) -> int:
        """Return of how many evaluations they are."""
        return len(self._rows)

    def find(self, value: Value) -> Channels | None:
        """Return what ``value`` is like; None where no product reads it."""
        point = self._points.get(value)
        if point is None:
            return None
        begin, count = _KINDS * point.start, point.channels
        table = np.memmap(self._path, np.float32, "r", shape=self._shape)
        part = np.array(table[self._rows, begin : begin + _KINDS * count])
        low, high, mean = part.reshape(len(part), _KINDS, count).swapaxes(0, 1)
        axis = 0 if point.axis is None else point.axis
        return Channels(low, high, mean.mean(axis=0), axis, point.shape)


def has_statistics(path: Path) -> bool:
    """Tell whether a `Recorder` has finished ``path``."""
    return _index(path).exists()


def _width(points: Iterable[Point]) -> int:
    return _KINDS * sum(point.channels for point in points)


def _index(path: Path) -> Path:
    return path.with_suffix(".json")
