"""Classifier-free guidance: how the two predictions are run, and how they are combined."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sdvino.diffusion.denoiser import Predict
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.errors import RequestError

#: Both predictions at once: one batch of two, or two requests side by side.
PredictBoth = Callable[[Float32, Level], tuple[Float32, Float32]]


def combine(
    cond: Float32, uncond: Float32, guidance_scale: float, guidance_rescale: float = 0.0
) -> Float32:
    """Return the guided prediction, float32 [N, C, h, w].

    Args:
        cond: the prediction for the prompt, float32 [N, C, h, w].
        uncond: the prediction for the negative (or empty) prompt, of the same shape.
        guidance_scale: 1 is ``cond`` itself (Ho & Salimans 2022, in diffusers' scale).
        guidance_rescale: from 0 to 1, how far the deviation of each picture is drawn back to that
            of ``cond`` (Lin et al. 2023, section 3.4).
    """
    guided: Float32 = uncond + np.float32(guidance_scale) * (cond - uncond)
    if guidance_rescale == 0.0:
        return guided
    axes = tuple(range(1, cond.ndim))
    ratio = np.std(cond, axis=axes, keepdims=True) / np.std(guided, axis=axes, keepdims=True)
    factor = np.float32(guidance_rescale) * ratio + np.float32(1.0 - guidance_rescale)
    rescaled: Float32 = (guided * factor).astype(np.float32, copy=False)
    return rescaled


def interval_of_steps(grid: Grid, start: float, end: float) -> tuple[float, float]:
    """Return the timesteps (low, high) that hold the steps from ``start`` to ``end``.

    Both are fractions of the grid's steps, from 0 to 1: step i of n is inside where
    start <= i / n < end. The bounds lie halfway to the neighbouring steps, so evaluations between
    steps go with the nearer one. Without a step inside, no timestep is.
    """
    t = [level.t for level in grid.levels[:-1]]
    inside = [i for i in range(len(t)) if start - 1e-9 <= i / len(t) < end - 1e-9]
    if not inside:
        return math.inf, math.inf
    first, last = inside[0], inside[-1]
    high = math.inf if first == 0 else (t[first - 1] + t[first]) / 2.0
    low = -math.inf if last == len(t) - 1 else (t[last] + t[last + 1]) / 2.0
    return low, high


class Guidance:
    """A ``Predict`` that guides: asks twice, or once where that says the same.

    Give either ``uncond``, run after ``cond``, or ``both``, which returns (cond, uncond) and may
    run them as one batch or side by side.

    ``interval`` limits guidance to levels with low <= t <= high and saves the second prediction
    elsewhere (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval").
    """

    def __init__(
        self,
        cond: Predict,
        uncond: Predict | None = None,
        *,
        both: PredictBoth | None = None,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise RequestError(f"The guidance scale is {guidance_scale}; give a finite number.")
        if not 0.0 <= guidance_rescale <= 1.0:
            raise RequestError(
                f"The guidance rescale is {guidance_rescale}; give a number from 0 to 1."
            )
        if interval is not None and not interval[0] <= interval[1]:
            raise RequestError(
                f"The guidance interval is {interval[0]} to {interval[1]}; give two timesteps, the "
                "smaller first."
            )
        if both is None and uncond is not None:
            both = _one_after_other(cond, uncond)
        if guidance_scale > 1.0 and both is None:
            raise RequestError("Guidance above 1 needs a prediction for the negative prompt.")
        self._cond = cond
        self._both = both
        self._scale = guidance_scale
        self._rescale = guidance_rescale
        self._interval = interval

    def __call__(self, x_in: Float32, level: Level, /) -> Float32:
        """Return the guided prediction at ``level``."""
        if self._both is None or not self.guides(level):
            return self._cond(x_in, level)
        cond, uncond = self._both(x_in, level)
        return combine(cond, uncond, self._scale, self._rescale)

    def guides(self, level: Level) -> bool:
        """Return whether the second prediction is needed at ``level``."""
        if self._scale <= 1.0:
            return False
        if self._interval is None:
            return True
        low, high = self._interval
        return low <= level.t <= high


def _one_after_other(cond: Predict, uncond: Predict) -> PredictBoth:
    def both(x_in: Float32, level: Level) -> tuple[Float32, Float32]:
        # A component may reuse its output buffer: keep the first result before the second run.
        first = np.array(cond(x_in, level), np.float32)
        return first, uncond(x_in, level)

    return both
