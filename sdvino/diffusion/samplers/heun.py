"""Heun: Euler, then once more with the mean of the slopes at both ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, clip_x0
from sdvino.diffusion.schedule import Schedule


def sample_heun(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1."""
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    for i, t in enumerate(timesteps):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = clip_x0(denoise(x, sigma, t), schedule.config)
        d = (x - denoised) / np.float32(sigma)
        dt = np.float32(sigma_to - sigma)
        if i + 1 < len(timesteps):
            x_to = x + d * dt
            denoised = clip_x0(denoise(x_to, sigma_to, timesteps[i + 1]), schedule.config)
            d = (d + (x_to - denoised) / np.float32(sigma_to)) / np.float32(2.0)
        x = x + d * dt
        yield SamplerStep(i, x, denoised, sigma, t)
