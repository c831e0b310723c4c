"""LCM: straight to the picture, then noise back up to the next level."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, clip_x0, x0_and_eps
from sdvino.diffusion.schedule import Schedule

_SIGMA_DATA = 0.5


def sample_lcm(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3."""
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_eps(denoise, x, sigmas[i], t)
        scaled = t * schedule.config.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
        x0 = np.float32(c_out) * clip_x0(x0, schedule.config) + np.float32(c_skip) * x
        x = x0.copy()
        if i + 1 < len(timesteps):
            a_to = schedule.alpha_cumprod(int(timesteps[i + 1]))
            x *= np.float32(math.sqrt(a_to))
            x += np.float32(math.sqrt(1.0 - a_to)) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, sigmas[i], t)
