"""Noise levels, and the run of them that a sampler walks down.

Everything that differs between processes stands in a level: how much picture, how much noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.scheduler_config import PredictionType, SamplerConfig
from sdvino.errors import RequestError, SdvinoError
from sdvino.settings import SamplerName

Float32 = NDArray[np.float32]
Floats = NDArray[np.floating]

#: Runge-Kutta steps that start PNDM, four evaluations each.
PRK_STEPS = 3


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: x = alpha x0 + sigma eps, with eps of unit variance.

    alpha is 1 where variance explodes (Euler, Heun, LMS); sqrt(alpha_bar), with
    sigma = sqrt(1 - alpha_bar), where it is preserved (DDIM, DPM++); 1 - sigma in flow matching.
    """

    #: Which timestep of the run this is, from 0: one more for each other timestep that the model is
    #: told. Evaluations at one timestep share it, as where a step of Heun's ends and the next one
    #: begins. What is done at every so many steps (step caching) goes by it.
    step: int
    alpha: float
    sigma: float
    #: The timestep that the model is told; fractional where diffusers' is.
    t: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log-SNR: -inf where all is noise, inf where nothing is."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.alpha) - np.log(self.sigma))

    @property
    def gain(self) -> float:
        """What brings the picture in x to its own size, 1 / alpha; 1 where there is none in it."""
        return 1.0 / self.alpha if self.alpha > 0.0 else 1.0

    def noised(self, x0: Float32, eps: Float32) -> Float32:
        """Return x for this picture and this noise, float32 [N, C, h, w] all."""
        x: Float32 = np.float32(self.alpha) * x0 + np.float32(self.sigma) * eps
        return x

    def eps(self, x: Float32, x0: Float32) -> Float32:
        """Return the noise in ``x`` when ``x0`` is the picture in it, float32 [N, C, h, w] all."""
        gain = self.gain
        rest = x * np.float32(gain) - x0 * np.float32(self.alpha * gain)
        eps: Float32 = rest / np.float32(self.sigma * gain)
        return eps


def make_levels(alphas: Floats, sigmas: Floats, timesteps: Floats) -> tuple[Level, ...]:
    """Return the levels of alphas and sigmas [steps + 1] and of timesteps [steps].

    The last one, of which no model is asked, is at timestep 0.
    """
    told = np.append(np.asarray(timesteps, np.float32), np.float32(0.0))
    steps = np.cumsum(np.diff(told, prepend=told[0]) != 0.0)
    rows = zip(steps.tolist(), alphas.tolist(), sigmas.tolist(), told.tolist(), strict=True)
    return tuple(Level(*row) for row in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A run of noise levels, falling, for one sampler.

    The latents that a sampler takes and yields are diffusers' own for that sampler: those of
    `initial` at the start, at ``levels[i + 1]`` after step i, and what the decoder takes (before
    its own scaling factor) at the end.
    """

    sampler: SamplerName
    #: One more than there are steps: the last is what noise remains.
    levels: tuple[Level, ...]
    #: What noise of unit variance is multiplied by to begin with: about the first sigma.
    init_scale: float
    #: What the sampler reads of the folder's scheduler configuration.
    config: SamplerConfig
    #: float32 [1 + num_train_timesteps]: alpha_bar at the timesteps -1 (what the grid ends at), 0,
    #: 1 and so on, of the training. Empty in flow matching.
    alpha_bars: Float32
    #: The first step that is taken.
    begin: int = 0

    @property
    def steps(self) -> int:
        """How many steps the whole grid has; a sampler takes those from ``begin`` on."""
        return len(self.levels) - 1

    @property
    def evaluations(self) -> int:
        """How often the model is asked; more often than there are steps for Heun and PNDM."""
        left = self.steps - self.begin
        if self.sampler == "heun":
            return 2 * left - 1
        if self.sampler != "pndm" or left == 1:
            return left
        return left + 1 if self.config.skip_prk_steps else left + 3 * self.runge_kutta_steps

    @property
    def runge_kutta_steps(self) -> int:
        """How many Runge-Kutta steps PNDM begins with."""
        return 0 if self.config.skip_prk_steps else min(PRK_STEPS, self.steps - self.begin - 1)

    @property
    def prediction_type(self) -> PredictionType:
        """What the model's output means."""
        return self.config.prediction_type

    def walk(self) -> Iterator[tuple[int, Level, Level]]:
        """Yield each step's number, the level that it starts from, and the one after it."""
        for i in range(self.begin, self.steps):
            yield i, self.levels[i], self.levels[i + 1]

    def trained(self, t: int, step: int = 0) -> Level:
        """Return the variance-preserving level of a whole training timestep, -1 or less: the end.

        ``step`` is what the level shall say; it matters where a model is asked there.
        """
        alpha_bar = float(self.alpha_bars[max(t, -1) + 1])
        return Level(step, math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar), float(t))

    def start(self, strength: float) -> Grid:
        """Return this grid begun later, for a picture to start from: its last ``strength``.

        Raises:
            RequestError: nothing of the grid is left.
        """
        kept = min(int(self.steps * strength), self.steps)
        if kept < 1:
            raise RequestError(
                f"Of {self.steps} steps none is left at a strength of {strength:g}; ask for more "
                "steps or a higher strength."
            )
        return replace(self, begin=self.steps - kept)

    def initial(self, noise: Floats, x0: Float32 | None = None) -> Float32:
        """Return the latents that the sampler starts with, float32 [N, C, h, w].

        Args:
            noise: of unit variance and that shape, drawn or given by the user.
            x0: the finished latents of a picture to start from; None: noise alone.
        """
        eps: Float32 = np.asarray(noise, np.float32)
        if x0 is not None:
            return self.levels[self.begin].noised(x0, eps)
        x: Float32 = eps * np.float32(self.init_scale)
        return x

    def final(self, x: Floats) -> Float32:
        """Return diffusers' final latents from the sampler's last state, an array of their own.

        Raises:
            SdvinoError: they are not finite, which a decoder would turn into a black picture.
        """
        if not np.isfinite(x).all():
            raise SdvinoError(
                f"The latents are not finite after {self.steps} steps of {self.sampler}; run the "
                "UNet in f32, or lower the guidance scale."
            )
        return np.array(x, np.float32)


def make_flow_grid(sampler: SamplerName, steps: int, *, shift: float = 1.0) -> Grid:
    """Lay the grid of a flow-matching model (x = (1 - sigma) x0 + sigma eps, t = 1000 sigma).

    The sigmas are those of diffusers' FlowMatchEulerDiscreteScheduler, which shifts the ends as
    well as what it lays between them.

    Args:
        sampler: ``euler`` or ``dpmpp_2m``.
        steps: how many.
        shift: the weight of high noise, more for large pictures: Esser et al. 2024, "Scaling
            Rectified Flow Transformers", equation 23.
    """
    config = SamplerConfig(prediction_type="flow_prediction")
    train = config.num_train_timesteps
    least = _shifted(np.array(1.0 / train), shift)
    sigmas = _shifted(np.linspace(1.0, least, steps), shift).astype(np.float32)
    timesteps = sigmas * np.float32(train)
    sigmas = np.append(sigmas, np.float32(0.0)).astype(np.float64)
    return Grid(
        sampler=sampler,
        levels=make_levels(1.0 - sigmas, sigmas, timesteps),
        init_scale=1.0,
        config=config,
        alpha_bars=np.empty(0, np.float32),
    )


def _shifted(sigmas: Floats, shift: float) -> Floats:
    shifted: Floats = shift * sigmas / (1.0 + (shift - 1.0) * sigmas)
    return shifted
