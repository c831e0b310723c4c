"""PNDM: four-step Adams-Bashforth on the model's output, started by Runge-Kutta or by Heun."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep

#: Adams-Bashforth weights by how many outputs there are, the newest first.
_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample_pndm(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models", algorithm 2.

    With ``skip_prk_steps`` (Stable Diffusion's setting) the three Runge-Kutta steps give way to
    one step that is taken twice, the second time with the mean of two outputs. Both take more
    evaluations than steps: ``grid.evaluations``.
    """
    model = _Model(denoise, grid)
    outputs: deque[Float32] = deque(maxlen=4)  # the newest first
    for i, level, end in grid.walk():
        # Each Runge-Kutta step asks at one timestep more, between its ends.
        done, more = i - grid.begin, min(i - grid.begin, grid.runge_kutta_steps)
        start = grid.trained(int(level.t), level.step + more)
        to = grid.trained(int(end.t), start.step + 1)
        if done < grid.runge_kutta_steps:
            x, x0, output = _runge_kutta(model, x, start, replace(to, step=start.step + 2))
            outputs.appendleft(output)
        elif done == 0 and i + 1 < grid.steps:
            x, x0, output = _twice(model, x, start, to)
            outputs.appendleft(output)
        else:
            x0, output = model(x, start)
            outputs.appendleft(output)
            x = model.transfer(x, _weighted(outputs), start, model.below(start))
        yield SamplerStep(i, x, x0, level)


class _Model:
    """The model's own output (epsilon or v), which the multistep formula combines."""

    def __init__(self, denoise: Denoise, grid: Grid) -> None:
        self._denoise = denoise
        self._predicts_v = grid.prediction_type == "v_prediction"
        self.stride = grid.config.num_train_timesteps // grid.steps
        self.trained = grid.trained

    def __call__(self, x: Float32, level: Level) -> tuple[Float32, Float32]:
        """Return the picture that the model sees in ``x`` at ``level``, and its output."""
        x0 = self._denoise(x, level)
        output = level.eps(x, x0)
        if self._predicts_v:
            output = np.float32(level.alpha) * output - np.float32(level.sigma) * x0
        return x0, output

    def below(self, level: Level) -> Level:
        """Return the level one stride further down."""
        return self.trained(int(level.t) - self.stride)

    def transfer(self, x: Float32, output: Float32, level: Level, to: Level) -> Float32:
        """Take ``x`` from ``level`` to ``to`` along ``output`` (the paper's phi).

        It is x = alpha' x0 + sigma' eps, with the x0 that is in ``x`` beside that eps.
        """
        if self._predicts_v:
            output = np.float32(level.alpha) * output + np.float32(level.sigma) * x
        kept = to.alpha / level.alpha
        x_to: Float32 = np.float32(kept) * x
        x_to += np.float32(to.sigma - kept * level.sigma) * output
        return x_to


def _weighted(outputs: deque[Float32]) -> Float32:
    total = np.zeros_like(outputs[0])
    for weight, output in zip(_WEIGHTS[len(outputs)], outputs, strict=True):
        total += np.float32(weight) * output
    return total


def _twice(model: _Model, x: Float32, level: Level, to: Level) -> tuple[Float32, Float32, Float32]:
    """Return the state after the first step, taken again with the mean of the slopes at its ends.

    The second time it starts from one stride above the next timestep, as diffusers' does.
    """
    _, output = model(x, level)
    x0, output_next = model(model.transfer(x, output, level, model.below(level)), to)
    mean = (output_next + output) / np.float32(2.0)
    return model.transfer(x, mean, model.trained(int(to.t) + model.stride), to), x0, output


def _runge_kutta(
    model: _Model, x: Float32, level: Level, to: Level
) -> tuple[Float32, Float32, Float32]:
    """Return the state after one fourth-order step from ``level`` to ``to``."""
    half = model.stride // 2
    middle = model.trained(int(to.t) + half, level.step + 1)
    x0, e1 = model(x, level)
    _, e2 = model(model.transfer(x, e1, level, model.trained(int(level.t) - half)), middle)
    _, e3 = model(model.transfer(x, e2, level, middle), middle)
    _, e4 = model(model.transfer(x, e3, level, to), to)
    mean = (e1 + np.float32(2.0) * (e2 + e3) + e4) / np.float32(6.0)
    return model.transfer(x, mean, level, to), x0, e1
