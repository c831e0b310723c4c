"""Heun: Euler, then once more with the mean of the slopes at both ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, clip_x0


def sample_heun(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1 (alpha = 1)."""
    for i, level, to in grid.walk():
        x0 = clip_x0(denoise(x, level), grid.config)
        eps = level.eps(x, x0)  # the slope dx / dsigma
        d_sigma = np.float32(to.sigma - level.sigma)
        if i + 1 < grid.steps:
            x_to = x + eps * d_sigma
            x0 = clip_x0(denoise(x_to, to), grid.config)
            eps = (eps + to.eps(x_to, x0)) / np.float32(2.0)
        x = x + eps * d_sigma
        yield SamplerStep(i, x, x0, level)
