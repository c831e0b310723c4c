"""LCM: straight to the picture, then noise back up to the next level."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, clip_x0

_SIGMA_DATA = 0.5


def sample_lcm(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3."""
    for i, level, to in grid.walk():
        scaled = level.t * grid.config.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
        x0 = clip_x0(denoise(x, level), grid.config)
        x0 = np.float32(c_out) * x0 + np.float32(c_skip) * x
        x = x0.copy()
        if i + 1 < grid.steps:
            x = grid.trained(int(to.t)).noised(x0, noise.randn(x.shape))
        yield SamplerStep(i, x, x0, level)
