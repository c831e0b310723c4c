"""DPM-Solver++, multistep, as an ODE and as an SDE: the linear part exactly, the rest by Taylor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, clip_x0
from sdvino.diffusion.schedule import Schedule

#: diffusers lowers the order towards the end of grids shorter than this.
_SHORT = 15


def sample_dpmpp_2m(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M; ``solver_order`` 1 and 3 too)."""
    return _sample(denoise, x, schedule, None)


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Lu et al. 2022, "DPM-Solver++": SDE-DPM-Solver++(2M)."""
    return _sample(denoise, x, schedule, noise)


def _sample(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource | None
) -> Iterator[SamplerStep]:
    config = schedule.config
    sigmas = schedule.sigmas.tolist()
    history: deque[Float32] = deque(maxlen=config.solver_order)  # x0 predictions, the newest first
    for i, t in enumerate(schedule.timesteps.tolist()):
        sigma_s, sigma_to = sigmas[i], sigmas[i + 1]
        scale = math.sqrt(1.0 + sigma_s**2)
        x0 = clip_x0(denoise(x * np.float32(scale), sigma_s, t), config)
        history.appendleft(x0)
        order = _order(schedule, i, len(history))
        alpha_t = 1.0 / math.sqrt(1.0 + sigma_to**2)
        ratio = sigma_to / sigma_s  # exp(-h)
        keep = alpha_t * scale * ratio  # sigma_t / sigma_s of the paper
        # The SDE goes down twice as far, by exp(-2h), and makes up for it with fresh noise.
        decay = ratio if noise is None else ratio**2
        x = np.float32(keep if noise is None else keep * ratio) * x
        for weight, term in zip(
            _weights(sigmas, i, order, decay, config.solver_type),
            _derivatives(sigmas, i, list(history)[:order]),
            strict=True,
        ):
            x += np.float32(alpha_t * weight) * term
        if noise is not None:
            fresh = alpha_t * sigma_to * math.sqrt(1.0 - decay)
            x += np.float32(fresh) * noise.randn(x.shape)
        yield SamplerStep(i, x, x0, sigma_s, t)


def _order(schedule: Schedule, i: int, known: int) -> int:
    """Return the order of step ``i``: lower at the start, and towards the end where it must be."""
    config, left = schedule.config, schedule.steps - i
    short = config.lower_order_final and schedule.steps < _SHORT
    if left == 1 and (config.euler_at_final or short or config.final_sigmas_type == "zero"):
        return 1
    order = min(config.solver_order, known)
    return min(order, 2) if left == 2 and short else order


def _derivatives(sigmas: list[float], i: int, m: list[Float32]) -> list[Float32]:
    """Return D0, D1, D2: the newest x0 and its differences by log-SNR, in units of the step h.

    The paper's r0 and r1 are h0 / h and h1 / h; kept as 1 / r, a step of no length does no harm.
    """
    if len(m) == 1:
        return m
    h = _log_ratio(sigmas[i], sigmas[i + 1])
    h0 = _log_ratio(sigmas[i - 1], sigmas[i])
    d10 = (m[0] - m[1]) * np.float32(h / h0)
    if len(m) == 2:
        return [m[0], d10]
    h1 = _log_ratio(sigmas[i - 2], sigmas[i - 1])
    d11 = (m[1] - m[2]) * np.float32(h / h1)
    bend = d10 - d11
    return [m[0], d10 + np.float32(h0 / (h0 + h1)) * bend, np.float32(h / (h0 + h1)) * bend]


def _weights(sigmas: list[float], i: int, order: int, decay: float, solver: str) -> list[float]:
    """Return what D0, D1 and D2 count in the step, over alpha_t.

    ``decay`` is exp(-h) or, as an SDE, exp(-2h); the formulas are the same with that h.
    """
    d0 = 1.0 - decay
    if order == 1:
        return [d0]
    h = -math.log(decay)
    if h == 0.0:
        return [0.0] * order
    if order == 2 and solver != "heun":
        return [d0, d0 / 2.0]
    d1 = 1.0 - d0 / h
    return [d0, d1] if order == 2 else [d0, d1, (d0 - h) / h**2 + 0.5]


def _log_ratio(sigma_from: float, sigma_to: float) -> float:
    return math.log(sigma_from / sigma_to)
