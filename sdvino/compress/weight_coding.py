"""Weights in few bits: the ways to write a layer down, and what each loses. NumPy alone.

A layer's weights are a matrix [channels, width]: output channels, and everything that one of them
reads. Weights that share a scale are a block: the matrix, a row, or a group within a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Granularity = Literal["tensor", "channel", "group"]
#: Where a block's range ends: at its extremes; where all but a thousandth of it lies; or where the
#: squared error after rounding is least.
Estimator = Literal["min-max", "percentile", "mse"]

#: Percent of a block's weights that the percentile estimator leaves beyond each end.
_BEYOND = 0.1
#: Shares of the whole range that the mse estimator tries.
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35, 0.25)
#: Weights beyond so many standard deviations are outliers: of a normal distribution 6 in 100,000.
_OUTLIER = 4.0
#: Weights that the mse estimator has in hand at a time.
_CHUNK = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """One way of writing weights down; scales are in half precision, zero points in the bits."""

    #: Of a weight: 8 or 4.
    bits: int
    granularity: Granularity
    #: Weights in a group, for granularity group.
    group_size: int | None = None
    #: The range is even around zero, so there is no zero point.
    symmetric: bool = False
    estimator: Estimator = "min-max"

    def fits(self, width: int) -> bool:
        """Tell whether rows of ``width`` weights can be written so."""
        return self.group_size is None or width % self.group_size == 0

    def blocks(self, rows: int, width: int) -> int:
        """Return how many scales a matrix of that size has."""
        if self.granularity == "tensor":
            return 1
        return rows if self.group_size is None else rows * width // self.group_size

    def bytes(self, rows: int, width: int) -> int:
        """Return the bytes of weights, scales and zero points."""
        blocks = self.blocks(rows, width)
        size = _packed(rows * width, self.bits) + 2 * blocks
        return size if self.symmetric else size + _packed(blocks, self.bits)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f" {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {self.granularity}{group}, {kind}, {self.estimator}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Weights as they are stored."""

    #: [blocks, weights in one]: i8 where symmetric, else u8; of 4 bits the values are 0 to 15.
    levels: NDArray[Any]
    #: [blocks, 1].
    scale: NDArray[np.float16]
    #: [blocks, 1]; None where the range is symmetric.
    zero: NDArray[np.uint8] | None

    def decode(self, shape: tuple[int, ...]) -> Matrix:
        """Return the weights that the levels stand for, float32, as a matrix of ``shape``."""
        values = self.levels.astype(np.float32)
        if self.zero is not None:
            values -= self.zero
        values *= self.scale.astype(np.float32)
        return values.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What the choice of a layer's coding goes by, beside its error."""

    #: Share of the weights beyond 4 standard deviations.
    outliers: float
    #: Excess kurtosis: 0 for a normal distribution, above for heavier tails.
    kurtosis: float
    #: Largest range of a channel over their median: 1 where all are alike.
    spread: float


def describe(matrix: Matrix) -> Distribution:
    """Return how the weights are distributed."""
    deviations = matrix - matrix.mean(dtype=np.float64).astype(np.float32)
    squares = np.square(deviations)
    variance = float(squares.mean(dtype=np.float64))
    if variance <= 0.0:
        return Distribution(outliers=0.0, kurtosis=0.0, spread=1.0)
    beyond = int(np.count_nonzero(squares > _OUTLIER**2 * variance))
    fourth = float(np.square(squares, out=squares).mean(dtype=np.float64))
    ranges = np.abs(matrix).max(axis=1)
    middle = float(np.median(ranges))
    return Distribution(
        outliers=beyond / matrix.size,
        kurtosis=fourth / variance**2 - 3.0,
        spread=float(ranges.max()) / middle if middle > 0.0 else 1.0,
    )


def encode(matrix: Matrix, coding: Coding) -> Encoded:
    """Return ``matrix``, float32 [channels, width], written as ``coding`` says."""
    blocks = matrix.reshape(coding.blocks(*matrix.shape), -1)
    low, high = _range(blocks, coding)
    if coding.estimator == "mse":
        low, high = _shrunk(blocks, low, high, coding)
    return _round(blocks, low, high, coding)


def squared_error(matrix: Matrix, coding: Coding) -> float:
    """Return what ``coding`` loses: the squared error over the squares of the weights."""
    difference = encode(matrix, coding).decode(matrix.shape)
    difference -= matrix
    return _squares(difference) / max(_squares(matrix), 1e-30)


def _range(blocks: Matrix, coding: Coding) -> tuple[Matrix, Matrix]:
    """Return the ends of the range of each block, [blocks, 1]; zero is always inside."""
    if coding.symmetric:
        sizes = np.abs(blocks)
        if coding.estimator == "percentile":
            high = np.percentile(sizes, 100 - 2 * _BEYOND, axis=1, keepdims=True)
        else:
            high = sizes.max(axis=1, keepdims=True)
        return -high.astype(np.float32), high.astype(np.float32)
    if coding.estimator == "percentile":
        low, high = np.percentile(blocks, (_BEYOND, 100 - _BEYOND), axis=1, keepdims=True)
    else:
        low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    return np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)


def _shrunk(blocks: Matrix, low: Matrix, high: Matrix, coding: Coding) -> tuple[Matrix, Matrix]:
    """Return the ranges, each of `_SHRUNK` that has the least squared error in its block."""
    share = np.ones_like(high)
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        least = np.full((len(blocks[part]), 1), np.inf, np.float32)
        for ratio in _SHRUNK:
            found = _round(blocks[part], low[part] * ratio, high[part] * ratio, coding)
            difference = found.decode(blocks[part].shape)
            difference -= blocks[part]
            errors = np.einsum("ij,ij->i", difference, difference)[:, None]
            better = errors < least
            least = np.where(better, errors, least)
            share[part] = np.where(better, np.float32(ratio), share[part])
    return low * share, high * share


def _round(blocks: Matrix, low: Matrix, high: Matrix, coding: Coding) -> Encoded:
    """Return ``blocks`` rounded to the levels of ranges from ``low`` to ``high``, [blocks, 1]."""
    # Symmetric levels leave out the lowest, as NNCF's do: zero is in the middle.
    least, most = (1 - 2 ** (coding.bits - 1), 2 ** (coding.bits - 1) - 1)
    if not coding.symmetric:
        least, most = 0, 2**coding.bits - 1
    scale = _half((high - low) / np.float32(most - least))
    wide = scale.astype(np.float32)
    levels = blocks / wide
    zero = None
    if not coding.symmetric:
        zero = np.clip(np.rint(-low / wide), least, most)
        levels += zero
    np.clip(np.rint(levels, out=levels), least, most, out=levels)
    return Encoded(
        levels=levels.astype(np.int8 if coding.symmetric else np.uint8),
        scale=scale,
        zero=None if zero is None else zero.astype(np.uint8),
    )


def _half(scale: Matrix) -> NDArray[np.float16]:
    """Return ``scale`` in half precision, rounded up, so that the range's ends stay inside."""
    scale = np.where(scale > 0.0, scale, np.float32(1.0))
    most = np.float16(np.finfo(np.float16).max)
    half = np.minimum(scale, np.float32(most)).astype(np.float16)
    up = np.minimum(np.nextafter(half, np.float16(np.inf)), most)
    rounded: NDArray[np.float16] = np.where(half.astype(np.float32) < scale, up, half)
    return rounded


def _squares(values: Matrix) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)
