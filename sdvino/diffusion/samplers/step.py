"""What every sampler takes and yields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.schedule import Schedule
from sdvino.diffusion.scheduler_config import SamplerConfig

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplerStep:
    """The state after a step."""

    #: From 0 to ``schedule.steps - 1``.
    index: int
    #: float32 [N, C, h, w]. The sampler goes on from this very array: writing into it between two
    #: steps changes what follows, as returning latents from diffusers' callback does.
    x: Float32
    #: float32 [N, C, h, w], the model's estimate of the finished latents: what a preview shows.
    denoised: Float32
    #: Noise level that the step started from.
    sigma: float
    #: Timestep that the model was told.
    timestep: float


class Sampler(Protocol):
    """A generator function from starting latents to finished ones."""

    def __call__(
        self,
        denoise: Denoise,
        x: Float32,
        schedule: Schedule,
        noise: NoiseSource,
        *,
        eta: float = 0.0,
    ) -> Iterator[SamplerStep]:
        """Yield the state after each step.

        Args:
            denoise: asked ``schedule.evaluations`` times.
            x: float32 [N, C, h, w], of ``initial_latents``; left as it is.
            schedule: made for this very sampler.
            noise: drawn from by the stochastic samplers, in diffusers' order.
            eta: DDIM's and TCD's share of fresh noise, 0 to 1; the others have no use for it.
        """
        ...


def x0_and_eps(denoise: Denoise, x: Float32, sigma: float, t: float) -> tuple[Float32, Float32]:
    """Split a variance-preserving state into the picture and the noise that the model sees in it.

    ``x`` is sqrt(a) * x0 + sqrt(1 - a) * eps with sigma = sqrt((1 - a) / a), possibly infinite.
    """
    if math.isinf(sigma):
        return denoise(x, sigma, t), x
    scaled = x * np.float32(math.sqrt(1.0 + sigma**2))
    x0 = denoise(scaled, sigma, t)
    return x0, (scaled - x0) / np.float32(sigma)


def clip_x0(x0: Float32, config: SamplerConfig) -> Float32:
    """Keep the denoised latents in range, as the folder's configuration asks (most ask nothing).

    ``thresholding`` is Imagen's (Saharia et al. 2022, section 2.3), picture by picture.
    """
    if config.thresholding:
        axes = tuple(range(1, x0.ndim))
        s = np.quantile(np.abs(x0), config.dynamic_thresholding_ratio, axis=axes, keepdims=True)
        s = np.clip(s, 1.0, config.sample_max_value).astype(np.float32)
        x0 = np.clip(x0, -s, s) / s
    elif config.clip_sample:
        x0 = np.clip(x0, -config.clip_sample_range, config.clip_sample_range)
    return x0
