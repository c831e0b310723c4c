"""TCD: a DDIM step to below the next noise level, then noise back up to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, x0_and_eps
from sdvino.diffusion.schedule import Schedule


def sample_tcd(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling.

    ``eta`` is the paper's gamma: 0 is deterministic; the authors suggest 0.3.
    """
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        t_to = 0 if last else int(timesteps[i + 1])
        a_to = schedule.alpha_cumprod(t_to)
        a_s = schedule.alpha_cumprod(math.floor((1.0 - eta) * t_to))
        x0, eps = x0_and_eps(denoise, x, sigmas[i], t)
        x = np.float32(math.sqrt(a_s)) * x0 + np.float32(math.sqrt(1.0 - a_s)) * eps
        if eta > 0.0 and not last:
            x *= np.float32(math.sqrt(a_to / a_s))
            x += np.float32(math.sqrt(1.0 - a_to / a_s)) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, sigmas[i], t)
