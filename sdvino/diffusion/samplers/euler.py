"""Euler: one step along the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep
from sdvino.diffusion.schedule import Schedule


def sample_euler(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1 without its second half."""
    sigmas = schedule.sigmas.tolist()
    for i, t in enumerate(schedule.timesteps.tolist()):
        denoised = denoise(x, sigmas[i], t)
        d = (x - denoised) / np.float32(sigmas[i])
        x = x + d * np.float32(sigmas[i + 1] - sigmas[i])
        yield SamplerStep(i, x, denoised, sigmas[i], t)
