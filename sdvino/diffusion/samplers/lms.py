"""LMS: Adams-Bashforth on the probability-flow ODE, up to four slopes back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep
from sdvino.diffusion.schedule import Schedule

_ORDER = 4


def sample_lms(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Linear multistep with unequal steps: K. Crowson's k-diffusion."""
    sigmas = schedule.sigmas.tolist()
    slopes: deque[Float32] = deque(maxlen=_ORDER)  # the newest first
    for i, t in enumerate(schedule.timesteps.tolist()):
        denoised = denoise(x, sigmas[i], t)
        slopes.appendleft((x - denoised) / np.float32(sigmas[i]))
        nodes = sigmas[i::-1][: len(slopes)]
        x = x.copy()
        for k, d in enumerate(slopes):
            x += d * np.float32(_lagrange_integral(nodes, k, sigmas[i], sigmas[i + 1]))
        yield SamplerStep(i, x, denoised, sigmas[i], t)


def _lagrange_integral(nodes: Sequence[float], k: int, start: float, end: float) -> float:
    """Integrate the polynomial that is 1 at ``nodes[k]`` and 0 at the others.

    It is a cubic at most, which Gauss and Legendre's rule of two points integrates exactly.
    """
    middle, half = (end + start) / 2, (end - start) / 2
    total = 0.0
    for tau in (middle - half / math.sqrt(3.0), middle + half / math.sqrt(3.0)):
        others = (node for j, node in enumerate(nodes) if j != k)
        total += math.prod((tau - node) / (nodes[k] - node) for node in others)
    return half * total
