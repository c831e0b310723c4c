"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Levels = NDArray[np.uint8]

#: Width and standard deviation (pixels) of SSIM's Gaussian window, and its two constants, as in
#: the paper.
WINDOW = 11
_DEVIATION = 1.5
_K1, _K2 = 0.01, 0.03
_PEAK = 255.0


def psnr(first: Levels, second: Levels) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB; infinity when equal."""
    _check_shapes(first, second)
    difference = first.astype(np.float64) - second.astype(np.float64)
    mean = float(np.mean(difference**2))
    return math.inf if mean == 0.0 else 10.0 * math.log10(_PEAK**2 / mean)


def ssim(first: Levels, second: Levels) -> float:
    """Return the structural similarity of two uint8 pictures [H, W] or [H, W, C], -1 to 1.

    The mean over all places where an 11 x 11 Gaussian window fits, and over the channels.
    Raises ValueError for pictures smaller than the window.
    Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment", 2004, section III.
    """
    _check_shapes(first, second)
    if first.ndim not in (2, 3) or min(first.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of {WINDOW} pixels or more, not {first.shape}.")
    x, y = (picture.astype(np.float64) for picture in (first, second))
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(np.mean(similarity))


def _blur(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the window's weighted mean wherever the window fits, along both sides."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _DEVIATION**2))
    weights /= weights.sum()
    for axis in (0, 1):
        picture = sliding_window_view(picture, WINDOW, axis) @ weights
    return picture


def _check_shapes(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Cannot compare shapes {first.shape} and {second.shape}.")
