"""TCD: a DDIM step to below the next noise level, then noise back up to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep


def sample_tcd(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling.

    ``eta`` is the paper's gamma: 0 is deterministic; the authors suggest 0.3.
    """
    for i, level, end in grid.walk():
        to = grid.trained(int(end.t))
        below = grid.trained(math.floor((1.0 - eta) * to.t))
        x0 = denoise(x, level)
        x = below.noised(x0, level.eps(x, x0))
        if eta > 0.0 and i + 1 < grid.steps:
            kept = to.alpha / below.alpha
            x *= np.float32(kept)
            x += np.float32(math.sqrt(1.0 - kept**2)) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, level)
