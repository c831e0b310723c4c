"""DDIM: from one noise level to the next by way of the picture, with some fresh noise if asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, clip_x0


def sample_ddim(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16."""
    # diffusers goes down by this stride, whatever the distance to the next timestep is.
    stride = grid.config.num_train_timesteps // grid.steps
    for i, level, _ in grid.walk():
        # The alphas of the training: those of ``level`` are a rounding away.
        start, to = grid.trained(int(level.t)), grid.trained(int(level.t) - stride)
        x0 = denoise(x, level)
        eps = level.eps(x, x0)
        x0 = clip_x0(x0, grid.config)
        s = eta * to.sigma / start.sigma * math.sqrt(1.0 - (start.alpha / to.alpha) ** 2)
        kept = math.sqrt(max(to.sigma**2 - s**2, 0.0))
        x = replace(to, sigma=kept).noised(x0, eps)
        if eta > 0.0:
            x += np.float32(s) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, level)
