"""UniPC: every model output first corrects the step that led to it, then predicts the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, clip_x0
from sdvino.diffusion.schedule import Schedule


def sample_unipc(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Zhao et al. 2023, "UniPC": UniP and UniC, multistep, predicting x0."""
    config = schedule.config
    sigmas = schedule.sigmas.tolist()
    history: deque[Float32] = deque(maxlen=config.solver_order)  # x0 predictions, the newest first
    x_last, order = x, 0
    for i, t in enumerate(schedule.timesteps.tolist()):
        scale = np.float32(math.sqrt(1.0 + sigmas[i] ** 2))
        x0 = clip_x0(denoise(x * scale, sigmas[i], t), config)
        if i > 0 and i - 1 not in config.disable_corrector:
            x = _step(sigmas, i - 1, order, x_last, list(history), config.solver_type, corrector=x0)
        history.appendleft(x0)
        order = min(config.solver_order, i + 1)
        if config.lower_order_final or sigmas[i + 1] == 0.0:
            order = min(order, schedule.steps - i)
        x_last = x
        x = _step(sigmas, i, order, x_last, list(history), config.solver_type)
        yield SamplerStep(i, x, x0, sigmas[i], t)


def _step(
    sigmas: list[float],
    i: int,
    order: int,
    x: Float32,
    m: list[Float32],
    solver_type: str,
    corrector: Float32 | None = None,
) -> Float32:
    """Take ``x`` from ``sigmas[i]`` to ``sigmas[i + 1]``.

    Args:
        sigmas: the grid.
        i: where the step starts.
        order: how many of the newest ``m`` it uses.
        x: float32 [N, C, h, w], the state at the start.
        m: x0 predictions, the newest (at the start) first.
        solver_type: ``bh1`` or ``bh2``, the paper's B(h) = h or exp(h) - 1.
        corrector: x0 as predicted at the end of the step; None to predict without it.
    """
    sigma_s, sigma_t = sigmas[i], sigmas[i + 1]
    alpha_t = 1.0 / math.sqrt(1.0 + sigma_t**2)
    ratio = sigma_t / sigma_s  # exp(-h)
    keep = ratio * alpha_t * math.sqrt(1.0 + sigma_s**2)
    x_t: Float32 = np.float32(keep) * x - np.float32(alpha_t * (ratio - 1.0)) * m[0]
    if ratio in (0.0, 1.0):  # only ever of first order, and nothing to correct
        return x_t
    h = -math.log(ratio)
    B = ratio - 1.0 if solver_type != "bh1" else -h
    r = np.array([-math.log(sigmas[i - k] / sigma_s) / h for k in range(1, order)] + [1.0])
    rho = _coefficients(r, -h, B, corrected=corrector is not None)
    for k in range(1, order):
        x_t -= np.float32(alpha_t * B * rho[k - 1] / r[k - 1]) * (m[k] - m[0])
    if corrector is not None:
        x_t -= np.float32(alpha_t * B * rho[-1]) * (corrector - m[0])
    return x_t


def _coefficients(
    r: NDArray[np.float64], h: float, B: float, *, corrected: bool
) -> NDArray[np.float64]:
    """Solve the paper's linear system for the weights of the differences.

    Where one weight is enough diffusers takes its limit of 1/2.
    """
    order = len(r)
    known = order if corrected else order - 1
    if known <= 1:
        return np.full(known, 0.5)
    phi = math.expm1(h) / h - 1.0
    b = []
    factorial = 1
    for n in range(1, order + 1):
        b.append(phi * factorial / B)
        factorial *= n + 1
        phi = phi / h - 1.0 / factorial
    R = np.vander(r, order, increasing=True).T
    solved: NDArray[np.float64] = np.linalg.solve(R[:known, :known], np.array(b[:known]))
    return solved
