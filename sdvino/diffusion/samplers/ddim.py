"""DDIM: from one noise level to the next by way of the picture, with some fresh noise if asked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, clip_x0, x0_and_eps
from sdvino.diffusion.schedule import Schedule


def sample_ddim(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16."""
    sigmas = schedule.sigmas.tolist()
    # diffusers goes down by this stride, whatever the distance to the next timestep is.
    stride = schedule.config.num_train_timesteps // schedule.steps
    for i, t in enumerate(schedule.timesteps.tolist()):
        a, a_to = schedule.alpha_cumprod(int(t)), schedule.alpha_cumprod(int(t) - stride)
        x0, eps = x0_and_eps(denoise, x, sigmas[i], t)
        x0 = clip_x0(x0, schedule.config)
        s = eta * math.sqrt((1.0 - a_to) / (1.0 - a) * (1.0 - a / a_to))
        kept = math.sqrt(max(1.0 - a_to - s**2, 0.0))
        x = np.float32(math.sqrt(a_to)) * x0 + np.float32(kept) * eps
        if eta > 0.0:
            x += np.float32(s) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, sigmas[i], t)
