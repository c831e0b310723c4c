"""The grid of noise levels and timesteps that a sampler walks down, exactly as diffusers lays it.

Grid, rounding and initial scale belong to the sampler: with Karras sigmas and 4 steps Euler asks
the model at timestep 687.15 and DPM-Solver++ at 687.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sdvino.diffusion.grids import Float32, sigmas_of, train_alphas_cumprod
from sdvino.diffusion.layout import DISTILLED, MULTISTEP, Floats, has_continuous_timesteps, lay_grid
from sdvino.diffusion.scheduler_config import PredictionType, SamplerConfig, SchedulerConfig
from sdvino.errors import RequestError, SdvinoError
from sdvino.settings import SAMPLERS, SamplerName, SigmaScheduleName, TimestepSpacing

#: Their state is x0 + sigma * eps. The others' is sqrt(a) * x0 + sqrt(1 - a) * eps.
_VARIANCE_EXPLODING = ("euler", "euler_ancestral", "heun", "lms")
_SIGMA_SCHEDULED = ("euler", "heun", "lms", *MULTISTEP)
_KEEP_ZERO_ALPHA = ("ddim", "lcm", "tcd")
#: diffusers has no code for these pairs.
_NOT_PREDICTED: dict[str, tuple[PredictionType, ...]] = {
    "euler_ancestral": ("sample",),
    "pndm": ("sample",),
}
#: Runge-Kutta steps that start PNDM, four evaluations each.
PRK_STEPS = 3


@dataclass(frozen=True)
class Schedule:
    """A grid of ``steps`` steps.

    The latents that a sampler takes and yields are diffusers' own for that sampler: noise of unit
    variance times ``init_scale`` at the start, and what the decoder takes (before its own scaling
    factor) at the end. Their noise level in between is ``sigmas``: x = x0 + sigma * eps for the
    variance-exploding samplers, that over sqrt(1 + sigma**2) for the variance-preserving ones.
    """

    sampler: SamplerName
    #: float32 [steps + 1], falling. The last is what noise remains. Infinite for an alpha of 0.
    sigmas: Float32
    #: float32 [steps], what the model is told; fractional where diffusers' are.
    timesteps: Float32
    #: float32 [num_train_timesteps]
    alphas_cumprod: Float32
    #: The cumulative alpha below timestep 0 (DDIM, PNDM).
    final_alpha_cumprod: float
    init_scale: float
    #: How often the model is asked; more than ``steps`` for Heun and PNDM.
    evaluations: int
    #: What the sampler reads of the folder's scheduler configuration.
    config: SamplerConfig

    @property
    def steps(self) -> int:
        """How many states the sampler yields."""
        return len(self.timesteps)

    @property
    def prediction_type(self) -> PredictionType:
        """What the model's output means."""
        return self.config.prediction_type

    @property
    def variance_preserving(self) -> bool:
        """Whether the latents keep unit variance on the way."""
        return self.sampler not in _VARIANCE_EXPLODING

    def alpha_cumprod(self, timestep: int) -> float:
        """Return the cumulative alpha at a whole training timestep; below 0, the final one."""
        if timestep < 0:
            return self.final_alpha_cumprod
        return float(self.alphas_cumprod[timestep])

    def sigma_at(self, timestep: float) -> float:
        """Return the noise level that belongs to ``timestep``, which may be fractional."""
        if has_continuous_timesteps(self.config):
            return math.exp(4.0 * timestep)
        return float(np.interp(timestep, np.arange(len(self._train_sigmas)), self._train_sigmas))

    @cached_property
    def _train_sigmas(self) -> Float32:
        return sigmas_of(self.alphas_cumprod)


def initial_latents(noise: Floats, schedule: Schedule) -> Float32:
    """Scale unit-variance noise (drawn, or given by the user) to where the sampler starts."""
    x: Float32 = np.asarray(noise, np.float32) * np.float32(schedule.init_scale)
    return x


def final_latents(x: Floats, schedule: Schedule) -> Float32:
    """Return diffusers' final latents from the last state of the sampler, as an array of their own.

    Raises:
        SdvinoError: they are not finite, which a decoder would turn into a black picture.
    """
    if not np.isfinite(x).all():
        raise SdvinoError(
            f"The latents are not finite after {schedule.steps} steps of {schedule.sampler}; run "
            "the UNet in f32, or lower the guidance scale."
        )
    return np.array(x, np.float32)


def make_schedule(
    sampler: SamplerName,
    config: SchedulerConfig,
    steps: int,
    *,
    sigma_schedule: SigmaScheduleName | None = None,
    timestep_spacing: TimestepSpacing | None = None,
) -> Schedule:
    """Lay the grid of ``sampler`` for ``steps`` steps.

    Args:
        sampler: any of ``SAMPLERS``.
        config: the model folder's.
        steps: from 1 to the number of training timesteps.
        sigma_schedule: sigmas between the ends; None: as ``config`` says.
        timestep_spacing: how timesteps are thinned out; None: as ``config`` says.

    Raises:
        RequestError: the sampler has no such sigmas, spacing or prediction type, or not that many
            steps.
        ModelFolderError: ``config`` contradicts itself.
    """
    if sampler not in SAMPLERS:
        raise RequestError(f"Unknown scheduler {sampler!r}; choose one of: {', '.join(SAMPLERS)}.")
    settings = _settings(sampler, config, sigma_schedule, timestep_spacing)
    _check_steps(sampler, settings, steps)
    alphas = train_alphas_cumprod(settings, keep_zero=sampler in _KEEP_ZERO_ALPHA)
    sigmas, timesteps = lay_grid(sampler, settings, steps, alphas)
    sigmas = sigmas.astype(np.float32)
    _check_falling(sampler, sigmas, settings)
    return Schedule(
        sampler=sampler,
        sigmas=sigmas,
        timesteps=timesteps.astype(np.float32),
        alphas_cumprod=alphas,
        final_alpha_cumprod=1.0 if settings.set_alpha_to_one else float(alphas[0]),
        init_scale=_init_scale(sampler, settings, float(sigmas[0])),
        evaluations=_evaluations(sampler, settings, len(timesteps)),
        config=settings,
    )


def _settings(
    sampler: SamplerName,
    config: SchedulerConfig,
    sigma_schedule: SigmaScheduleName | None,
    timestep_spacing: TimestepSpacing | None,
) -> SamplerConfig:
    """Return the folder's configuration for ``sampler`` with the caller's choices laid over it."""
    settings = config.for_sampler(sampler)
    if sigma_schedule is not None:
        if sigma_schedule != "default" and sampler not in _SIGMA_SCHEDULED:
            raise RequestError(
                f"The scheduler {sampler} has no {sigma_schedule} sigmas; leave them at default, "
                f"or choose one of: {', '.join(_SIGMA_SCHEDULED)}."
            )
        settings = replace(
            settings,
            use_karras_sigmas=sigma_schedule == "karras",
            use_exponential_sigmas=sigma_schedule == "exponential",
            use_beta_sigmas=False,
            use_lu_lambdas=False,
        )
    if timestep_spacing is not None:
        if timestep_spacing != "leading" and sampler in DISTILLED:
            raise RequestError(
                f"The scheduler {sampler} takes its timesteps from the distillation; leave out the "
                "timestep spacing."
            )
        settings = replace(settings, timestep_spacing=timestep_spacing)
    _check_settings(sampler, settings)
    return settings


def _check_settings(sampler: SamplerName, settings: SamplerConfig) -> None:
    if settings.use_beta_sigmas:
        raise RequestError(
            "scheduler_config.json asks for beta sigmas, which are not available here; choose the "
            "sigma schedule default, karras or exponential."
        )
    if settings.prediction_type in _NOT_PREDICTED.get(sampler, ()):
        raise RequestError(
            f"The scheduler {sampler} cannot run a model that predicts "
            f"{settings.prediction_type}; choose ddim, euler or dpmpp_2m."
        )
    if settings.variance_type in ("learned", "learned_range") or not settings.predict_x0:
        raise RequestError(
            f"scheduler_config.json asks for a kind of {sampler} that is not available here "
            "(learned variance, or predict_x0 false); choose the scheduler ddim."
        )


def _check_steps(sampler: SamplerName, settings: SamplerConfig, steps: int) -> None:
    least, most = 1, settings.num_train_timesteps
    if sampler in DISTILLED:
        most = min(most, settings.original_inference_steps)
    if sampler == "pndm" and not settings.skip_prk_steps:
        least = PRK_STEPS + 1
    whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if not whole or not least <= steps <= most:
        raise RequestError(
            f"The number of steps is {steps!r}; give {sampler} a whole number from {least} to "
            f"{most}."
        )


def _check_falling(sampler: SamplerName, sigmas: Float32, settings: SamplerConfig) -> None:
    falls = np.all(sigmas[1:-1] < sigmas[:-2]) and sigmas[-1] <= sigmas[-2]
    if not falls or not np.all(sigmas[:-1] > 0):
        raise RequestError(
            f"{len(sigmas) - 1} steps of {sampler} would repeat noise levels on this grid; ask for "
            "fewer, or check sigma_min in scheduler_config.json."
        )
    if np.isinf(sigmas[0]) and settings.prediction_type == "epsilon":
        raise RequestError(
            f"With zero terminal SNR {sampler} starts from pure noise, from which a model that "
            "predicts epsilon cannot tell the picture; choose the timestep spacing leading."
        )


def _init_scale(sampler: SamplerName, settings: SamplerConfig, sigma_max: float) -> float:
    if sampler not in _VARIANCE_EXPLODING:
        return 1.0
    if settings.timestep_spacing == "leading":
        return math.sqrt(sigma_max**2 + 1.0)
    return sigma_max


def _evaluations(sampler: SamplerName, settings: SamplerConfig, steps: int) -> int:
    if sampler == "heun":
        return 2 * steps - 1
    if sampler == "pndm" and not settings.skip_prk_steps:
        return steps + 3 * PRK_STEPS
    if sampler == "pndm" and steps > 1:
        return steps + 1
    return steps
