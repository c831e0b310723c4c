"""What every sampler takes and yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.scheduler_config import SamplerConfig


@dataclass(frozen=True, slots=True)
class SamplerStep:
    """The state after a step."""

    #: From ``grid.begin`` to ``grid.steps - 1``.
    index: int
    #: float32 [N, C, h, w]. The sampler goes on from this very array: writing into it between two
    #: steps changes what follows, as returning latents from diffusers' callback does.
    x: Float32
    #: float32 [N, C, h, w], the model's estimate of the finished latents: what a preview shows.
    denoised: Float32
    #: Where the step started from.
    level: Level


class Sampler(Protocol):
    """A generator function from starting latents to finished ones."""

    def __call__(
        self,
        denoise: Denoise,
        x: Float32,
        grid: Grid,
        noise: NoiseSource,
        *,
        eta: float = 0.0,
    ) -> Iterator[SamplerStep]:
        """Yield the state after each step.

        Args:
            denoise: asked ``grid.evaluations`` times.
            x: float32 [N, C, h, w], of ``grid.initial``; left as it is.
            grid: made for this very sampler.
            noise: drawn from by the stochastic samplers, in diffusers' order.
            eta: DDIM's and TCD's share of fresh noise, 0 to 1; the others have no use for it.
        """
        ...


def advance(x: Float32, x0: Float32, level: Level, to: Level) -> Float32:
    """Return alpha' x0 + sigma' eps, the state at ``to`` with the noise that is in ``x``.

    It is written as what changes on the way from ``level``, which rounds as diffusers' Euler does.
    """
    x_to: Float32 = x + np.float32(to.alpha - level.alpha) * x0
    x_to += np.float32(to.sigma - level.sigma) * level.eps(x, x0)
    return x_to


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
