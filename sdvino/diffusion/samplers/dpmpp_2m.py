"""DPM-Solver++, multistep, as an ODE and as an SDE: the linear part exactly, the rest by Taylor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, clip_x0

#: diffusers lowers the order towards the end of grids shorter than this.
_SHORT = 15


def sample_dpmpp_2m(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M; ``solver_order`` 1 and 3 too)."""
    return _sample(denoise, x, grid, None)


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Lu et al. 2022, "DPM-Solver++": SDE-DPM-Solver++(2M)."""
    return _sample(denoise, x, grid, noise)


def _sample(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource | None
) -> Iterator[SamplerStep]:
    lams = [level.lam for level in grid.levels]
    history: deque[Float32] = deque(maxlen=grid.config.solver_order)  # x0, the newest first
    for i, level, to in grid.walk():
        x0 = clip_x0(denoise(x, level), grid.config)
        history.appendleft(x0)
        order = _order(grid, i, len(history))
        h = lams[i + 1] - lams[i]
        keep = to.sigma / level.sigma
        if noise is not None:  # as an SDE twice as far down, made up for with fresh noise
            keep, h = keep * math.exp(-h), 2.0 * h
        x = np.float32(keep) * x
        terms = _derivatives(lams, i, list(history)[:order])
        for weight, term in zip(_weights(h, order, grid.config.solver_type), terms, strict=True):
            x += np.float32(to.alpha * weight) * term
        if noise is not None:
            x += np.float32(to.sigma * math.sqrt(-math.expm1(-h))) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, level)


def _order(grid: Grid, i: int, known: int) -> int:
    """Return the order of step ``i``: lower at the start, and towards the end where it must be."""
    config, left = grid.config, grid.steps - i
    short = config.lower_order_final and grid.steps < _SHORT
    if left == 1 and (config.euler_at_final or short or config.final_sigmas_type == "zero"):
        return 1
    order = min(config.solver_order, known)
    return min(order, 2) if left == 2 and short else order


def _derivatives(lams: list[float], i: int, m: list[Float32]) -> list[Float32]:
    """Return D0, D1, D2: the newest x0 and its differences by lambda, in units of the step h.

    The paper's r0 and r1 are h0 / h and h1 / h; kept as 1 / r, a step of no length does no harm.
    """
    if len(m) == 1:
        return m
    h, h0 = lams[i + 1] - lams[i], lams[i] - lams[i - 1]
    d10 = (m[0] - m[1]) * np.float32(h / h0)
    if len(m) == 2:
        return [m[0], d10]
    h1 = lams[i - 1] - lams[i - 2]
    bend = d10 - (m[1] - m[2]) * np.float32(h / h1)
    return [m[0], d10 + np.float32(h0 / (h0 + h1)) * bend, np.float32(h / (h0 + h1)) * bend]


def _weights(h: float, order: int, solver: str) -> list[float]:
    """Return what D0, D1 and D2 count in a step of length ``h``, over alpha."""
    d0 = -math.expm1(-h)
    if order == 1:
        return [d0]
    if h == 0.0:
        return [0.0] * order
    if order == 2 and solver != "heun":
        return [d0, d0 / 2.0]
    d1 = 1.0 - d0 / h
    return [d0, d1] if order == 2 else [d0, d1, (d0 - h) / h**2 + 0.5]
