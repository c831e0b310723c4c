"""PNDM: four-step Adams-Bashforth on the model's output, started by Runge-Kutta or by Heun."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import Float32, SamplerStep, x0_and_eps
from sdvino.diffusion.schedule import PRK_STEPS, Schedule

#: Adams-Bashforth weights by how many outputs there are, the newest first.
_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample_pndm(
    denoise: Denoise, x: Float32, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models", algorithm 2.

    With ``skip_prk_steps`` (Stable Diffusion's setting) the three Runge-Kutta steps give way to
    one step that is taken twice, the second time with the mean of two outputs. Both take more
    evaluations than steps: ``schedule.evaluations``.
    """
    model = _Model(denoise, schedule)
    timesteps = [int(t) for t in schedule.timesteps.tolist()]
    sigmas = schedule.sigmas.tolist()
    stride = schedule.config.num_train_timesteps // len(timesteps)
    outputs: deque[Float32] = deque(maxlen=4)  # the newest first
    for i, t in enumerate(timesteps):
        if not schedule.config.skip_prk_steps and i < PRK_STEPS:
            x, x0, output = _runge_kutta(model, x, t, timesteps[i + 1], stride)
            outputs.appendleft(output)
        elif i == 0 and len(timesteps) > 1:
            x, x0, output = _twice(model, x, t, timesteps[1], stride)
            outputs.appendleft(output)
        else:
            x0, output = model(x, t)
            outputs.appendleft(output)
            x = model.transfer(x, _weighted(outputs), t, t - stride)
        yield SamplerStep(i, x, x0, sigmas[i], float(t))


class _Model:
    """The model's own output (epsilon or v), which the multistep formula combines."""

    def __init__(self, denoise: Denoise, schedule: Schedule) -> None:
        self._denoise = denoise
        self._schedule = schedule
        self._predicts_v = schedule.prediction_type == "v_prediction"

    def __call__(self, x: Float32, t: int) -> tuple[Float32, Float32]:
        """Return the picture that the model sees in ``x`` at ``t``, and its output."""
        a = self._schedule.alpha_cumprod(t)
        x0, eps = x0_and_eps(self._denoise, x, math.sqrt((1.0 - a) / a), float(t))
        if self._predicts_v:
            eps = np.float32(math.sqrt(a)) * eps - np.float32(math.sqrt(1.0 - a)) * x0
        return x0, eps

    def transfer(self, x: Float32, output: Float32, t: int, t_to: int) -> Float32:
        """Take ``x`` from ``t`` to ``t_to`` along ``output`` (the paper's phi)."""
        a, a_to = self._schedule.alpha_cumprod(t), self._schedule.alpha_cumprod(t_to)
        if self._predicts_v:
            output = np.float32(math.sqrt(a)) * output + np.float32(math.sqrt(1.0 - a)) * x
        below = a * math.sqrt(1.0 - a_to) + math.sqrt(a * (1.0 - a) * a_to)
        x_to: Float32 = np.float32(math.sqrt(a_to / a)) * x
        x_to -= np.float32((a_to - a) / below) * output
        return x_to


def _weighted(outputs: deque[Float32]) -> Float32:
    total = np.zeros_like(outputs[0])
    for weight, output in zip(_WEIGHTS[len(outputs)], outputs, strict=True):
        total += np.float32(weight) * output
    return total


def _twice(
    model: _Model, x: Float32, t: int, t_next: int, stride: int
) -> tuple[Float32, Float32, Float32]:
    """Return the state after the first step, taken again with the mean of the slopes at its ends.

    The second time it starts from one stride above the next timestep, as diffusers' does.
    """
    _, output = model(x, t)
    x_trial = model.transfer(x, output, t, t - stride)
    x0, output_next = model(x_trial, t_next)
    mean = (output_next + output) / np.float32(2.0)
    return model.transfer(x, mean, t_next + stride, t_next), x0, output


def _runge_kutta(
    model: _Model, x: Float32, t: int, t_next: int, stride: int
) -> tuple[Float32, Float32, Float32]:
    """Return the state after one fourth-order step from ``t`` to ``t_next``."""
    half = stride // 2
    middle = t_next + half
    x0, e1 = model(x, t)
    _, e2 = model(model.transfer(x, e1, t, t - half), middle)
    _, e3 = model(model.transfer(x, e2, t, middle), middle)
    _, e4 = model(model.transfer(x, e3, t, middle - half), t_next)
    mean = (e1 + np.float32(2.0) * (e2 + e3) + e4) / np.float32(6.0)
    return model.transfer(x, mean, t, t_next), x0, e1
