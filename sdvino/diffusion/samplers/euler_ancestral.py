"""Euler ancestral: a step further down than asked, then noise back up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep
from sdvino.diffusion.schedule import Schedule


def sample_euler_ancestral(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Ancestral sampling (Ho et al. 2020) with Euler steps: K. Crowson's k-diffusion."""
    sigmas = schedule.sigmas.tolist()
    for i, t in enumerate(schedule.timesteps.tolist()):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma, t)
        sigma_up = sigma_to * math.sqrt(sigma**2 - sigma_to**2) / sigma
        sigma_down = sigma_to**2 / sigma
        d = (x - denoised) / np.float32(sigma)
        x = x + d * np.float32(sigma_down - sigma)
        x += noise.randn(x.shape) * np.float32(sigma_up)
        yield SamplerStep(i, x, denoised, sigma, t)
