"""LMS: Adams-Bashforth on the probability-flow ODE, up to four slopes back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep

_ORDER = 4


def sample_lms(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Linear multistep with unequal steps (alpha = 1): K. Crowson's k-diffusion."""
    slopes: deque[Float32] = deque(maxlen=_ORDER)  # dx / dsigma, which is eps; the newest first
    nodes: deque[float] = deque(maxlen=_ORDER)
    for i, level, to in grid.walk():
        x0 = denoise(x, level)
        slopes.appendleft(level.eps(x, x0))
        nodes.appendleft(level.sigma)
        x = x.copy()
        for k, eps in enumerate(slopes):
            x += eps * np.float32(_lagrange_integral(nodes, k, level.sigma, to.sigma))
        yield SamplerStep(i, x, x0, level)


def _lagrange_integral(nodes: Sequence[float], k: int, start: float, end: float) -> float:
    """Integrate the polynomial that is 1 at ``nodes[k]`` and 0 at the others.

    It is a cubic at most, which Gauss and Legendre's rule of two points integrates exactly.
    """
    middle, half = (end + start) / 2, (end - start) / 2
    total = 0.0
    for tau in (middle - half / math.sqrt(3.0), middle + half / math.sqrt(3.0)):
        others = (node for j, node in enumerate(nodes) if j != k)
        total += math.prod((tau - node) / (nodes[k] - node) for node in others)
    return half * total
