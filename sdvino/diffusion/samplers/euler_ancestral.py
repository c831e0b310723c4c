"""Euler ancestral: a step further down than asked, then noise back up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, advance


def sample_euler_ancestral(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Ancestral sampling (Ho et al. 2020) with Euler steps: K. Crowson's k-diffusion."""
    for i, level, to in grid.walk():
        x0 = denoise(x, level)
        up = to.sigma * math.sqrt(level.sigma**2 - to.sigma**2) / level.sigma
        x = advance(x, x0, level, replace(to, sigma=to.sigma**2 / level.sigma))
        x += noise.randn(x.shape) * np.float32(up)
        yield SamplerStep(i, x, x0, level)
