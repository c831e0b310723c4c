"""UniPC: every model output first corrects the step that led to it, then predicts the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, clip_x0


def sample_unipc(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Zhao et al. 2023, "UniPC": UniP and UniC, multistep, predicting x0."""
    config, levels = grid.config, grid.levels
    history: deque[Float32] = deque(maxlen=config.solver_order)  # x0 predictions, the newest first
    x_last, order = x, 0
    for i, level, to in grid.walk():
        x0 = clip_x0(denoise(x, level), config)
        if i > grid.begin and i - 1 not in config.disable_corrector:
            back = levels[i::-1][: order + 1]
            x = _step(back, x_last, list(history), config.solver_type, corrector=x0)
        history.appendleft(x0)
        order = len(history)
        if config.lower_order_final or to.sigma == 0.0:
            order = min(order, grid.steps - i)
        x_last = x
        x = _step(levels[i + 1 :: -1][: order + 1], x_last, list(history), config.solver_type)
        yield SamplerStep(i, x, x0, level)


def _step(
    levels: Sequence[Level],
    x: Float32,
    m: list[Float32],
    solver_type: str,
    corrector: Float32 | None = None,
) -> Float32:
    """Take ``x`` from ``levels[1]`` to ``levels[0]``.

    Args:
        levels: where the step ends, where it starts, and those before: one more than its order.
        x: float32 [N, C, h, w], the state at the start.
        m: x0 predictions, the newest (at the start) first.
        solver_type: ``bh1`` or ``bh2``, the paper's B(h) = h or exp(h) - 1.
        corrector: x0 as predicted at the end of the step; None to predict without it.
    """
    to, level, *before = levels
    h = to.lam - level.lam
    decay = math.expm1(-h)
    x_t: Float32 = np.float32(to.sigma / level.sigma) * x - np.float32(to.alpha * decay) * m[0]
    if h in (0.0, math.inf):  # only ever of first order, and nothing to correct
        return x_t
    B = -h if solver_type == "bh1" else decay
    r = np.array([(past.lam - level.lam) / h for past in before] + [1.0])
    rho = _coefficients(r, -h, B, corrected=corrector is not None)
    for k in range(len(before)):
        x_t -= np.float32(to.alpha * B * rho[k] / r[k]) * (m[k + 1] - m[0])
    if corrector is not None:
        x_t -= np.float32(to.alpha * B * rho[-1]) * (corrector - m[0])
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
