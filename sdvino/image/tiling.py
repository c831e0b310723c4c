"""Tiled decoding: a large picture in the memory of a small one.

Neighbouring tiles overlap and are blended in float with linear ramps. A decoder sees less around a
tile's edge, and its group norms see other statistics in every tile, so a seam would show both as a
line and as a step of brightness; a ramp over the overlap hides either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError

#: Latents on a side of a tile (512 pixels), and how many of them two neighbours share.
TILE = 64
OVERLAP = 16


def tile_shape(
    height: int, width: int, *, tile: int = TILE, overlap: int = OVERLAP
) -> tuple[int, int]:
    """Return the one shape that every tile of latents ``height`` x ``width`` has.

    Raises RequestError for a tile or overlap that cannot be.
    """
    if tile < 2 or not 0 <= overlap <= tile // 2:
        raise RequestError(
            f"Tiles of {tile} latents with an overlap of {overlap} cannot be;"
            " give an overlap from 0 to half the tile."
        )
    return min(height, tile), min(width, tile)


def tiled_decode(
    decode_tile: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    latents: NDArray[np.float32],
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> NDArray[np.float32]:
    """Decode ``latents`` float32 [N, C, h, w] tile by tile; return float32 [N, h*f, w*f, 3].

    ``decode_tile`` takes float32 [N, C, th, tw], of one shape throughout (see `tile_shape`), and
    returns float32 [N, th*f, tw*f, 3]. Beside the picture itself only one tile is held.
    Raises RequestError for a tile or overlap that cannot be.
    """
    height, width = latents.shape[2:]
    th, tw = tile_shape(height, width, tile=tile, overlap=overlap)
    rows, columns = _starts(height, th, overlap), _starts(width, tw, overlap)
    picture: NDArray[np.float32] | None = None
    down: list[NDArray[np.float32]] = []
    across: list[NDArray[np.float32]] = []
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            part = np.ascontiguousarray(latents[:, :, y : y + th, x : x + tw])
            pixels = decode_tile(part)
            f = pixels.shape[1] // th
            if picture is None:
                picture = np.zeros((len(latents), height * f, width * f, 3), np.float32)
                down, across = _weights(rows, th, f), _weights(columns, tw, f)
            weights = down[i][:, None] * across[j][None, :]
            picture[:, y * f : (y + th) * f, x * f : (x + tw) * f] += pixels * weights[..., None]
    assert picture is not None  # there is always a first tile
    return picture


def to_levels(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the 8-bit levels of a float picture from 0 to 1, rounded as diffusers does."""
    return np.asarray(np.rint(np.clip(picture, 0.0, 1.0) * np.float32(255.0)), np.uint8)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where the fewest tiles begin that cover ``length`` evenly, sharing ``overlap``."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def _weights(starts: list[int], tile: int, factor: int) -> list[NDArray[np.float32]]:
    """Return each tile's weights along one axis, in pixels; at every pixel they add up to 1."""
    size = tile * factor
    ramps = []
    for i, start in enumerate(starts):
        before = (starts[i - 1] + tile - start) * factor if i > 0 else 0
        after = (start + tile - starts[i + 1]) * factor if i + 1 < len(starts) else 0
        ramps.append(np.minimum(_ramp(size, before), _ramp(size, after)[::-1]))
    total = np.zeros((starts[-1] + tile) * factor)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start * factor : start * factor + size] += ramp
    return [
        (ramp / total[start * factor : start * factor + size]).astype(np.float32)
        for start, ramp in zip(starts, ramps, strict=True)
    ]


def _ramp(size: int, length: int) -> NDArray[np.float64]:
    """Return weights that rise from nearly 0 to 1 over the first ``length`` of ``size`` pixels."""
    if length <= 0:
        return np.ones(size)
    return np.minimum((np.arange(size) + 0.5) / length, 1.0)
