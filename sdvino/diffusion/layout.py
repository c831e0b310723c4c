"""The grid of each kind of sampler, exactly as diffusers lays it.

Grid, rounding and initial scale belong to the sampler: with Karras sigmas and 4 steps Euler asks
the model at timestep 687.15 and DPM-Solver++ at 687.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from sdvino.diffusion.grid import PRK_STEPS, Floats, Grid, Level, make_levels
from sdvino.diffusion.schedule import (
    Float32,
    linspace32,
    sigmas_between,
    sigmas_of,
    spaced_timesteps,
    timesteps_of,
    train_alphas_cumprod,
)
from sdvino.diffusion.scheduler_config import PredictionType, SamplerConfig, SchedulerConfig
from sdvino.errors import RequestError
from sdvino.settings import SAMPLERS, SamplerName, SigmaScheduleName, TimestepSpacing

DISTILLED = ("lcm", "tcd")
_MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
_VARIANCE_EXPLODING = ("euler", "euler_ancestral", "heun", "lms")
_SIGMA_SCHEDULED = ("euler", "heun", "lms", *_MULTISTEP)
_KEEP_ZERO_ALPHA = ("ddim", "lcm", "tcd")
#: diffusers has no code for these pairs.
_NOT_PREDICTED: dict[str, tuple[PredictionType, ...]] = {
    "euler_ancestral": ("sample",),
    "pndm": ("sample",),
}


def make_grid(
    sampler: SamplerName,
    config: SchedulerConfig,
    steps: int,
    *,
    sigma_schedule: SigmaScheduleName | None = None,
    timestep_spacing: TimestepSpacing | None = None,
) -> Grid:
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
    sigmas, timesteps = _lay(sampler, settings, steps, alphas)
    levels = _levels(sampler, sigmas, timesteps)
    _check_falling(sampler, levels, settings)
    end = np.float32(1.0) if settings.set_alpha_to_one else alphas[0]
    return Grid(
        sampler=sampler,
        levels=levels,
        init_scale=_init_scale(sampler, settings, levels[0].sigma),
        config=settings,
        alpha_bars=np.insert(alphas, 0, end),
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


def _check_falling(
    sampler: SamplerName, levels: tuple[Level, ...], settings: SamplerConfig
) -> None:
    *lams, last = (level.lam for level in levels)
    rises = all(low < high for low, high in pairwise(lams)) and lams[-1] <= last
    if not rises or lams[-1] == math.inf:
        raise RequestError(
            f"{len(lams)} steps of {sampler} would repeat noise levels on this grid; ask for "
            "fewer, or check sigma_min in scheduler_config.json."
        )
    if levels[0].alpha == 0.0 and settings.prediction_type == "epsilon":
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


def _lay(
    sampler: SamplerName, settings: SamplerConfig, steps: int, alphas: Float32
) -> tuple[Floats, Floats]:
    """Return the sigmas [steps + 1] and the timesteps [steps] that diffusers' class would lay.

    Args:
        sampler: any.
        settings: spacing, kind of sigmas and ends are read.
        steps: how many. (diffusers makes a few more or fewer of it in two rare settings.)
        alphas: float32 [num_train_timesteps], the cumulative alphas.

    Raises:
        RequestError: the timesteps would lie outside the training range.
    """
    if sampler in DISTILLED:
        return _distilled_grid(sampler, settings, steps, alphas)
    if sampler in ("ddim", "pndm"):
        return _training_grid(settings, steps, alphas)
    if sampler in _MULTISTEP:
        return _multistep_grid(sampler, settings, steps, alphas)
    return _sigma_grid(sampler, settings, steps, alphas)


def _levels(sampler: SamplerName, sigmas: Floats, timesteps: Floats) -> tuple[Level, ...]:
    """Return the levels of sigmas [steps + 1], those of x0 + sigma eps, as the sampler has them."""
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    if sampler in _VARIANCE_EXPLODING:
        return make_levels(np.ones_like(sigmas), sigmas, timesteps)
    with np.errstate(divide="ignore"):  # at the picture
        shares = 1.0 / np.sqrt(1.0 + sigmas**-2.0)
    return make_levels(1.0 / np.sqrt(1.0 + sigmas**2), shares, timesteps)


def _training_grid(settings: SamplerConfig, steps: int, alphas: Float32) -> tuple[Floats, Floats]:
    """DDIM and PNDM: whole training timesteps, and whatever noise lies a stride below the last."""
    train = settings.num_train_timesteps
    timesteps = spaced_timesteps(
        settings.timestep_spacing, steps, train, offset=settings.steps_offset
    ).round()
    _check_range(timesteps, train)
    below = int(timesteps[-1]) - train // steps
    if below >= 0:
        last = alphas[below]
    else:
        last = np.float32(1.0) if settings.set_alpha_to_one else alphas[0]
    levels = np.append(alphas[timesteps.astype(np.int64)], last)
    return sigmas_of(levels), timesteps


def _distilled_grid(
    sampler: SamplerName, settings: SamplerConfig, steps: int, alphas: Float32
) -> tuple[Floats, Floats]:
    """LCM and TCD: a part of the timesteps that the distillation was done on."""
    original = settings.original_inference_steps
    if original > settings.num_train_timesteps:
        raise RequestError(
            f"scheduler_config.json says original_inference_steps is {original}, which is more "
            f"than the {settings.num_train_timesteps} training timesteps; correct one of the two."
        )
    stride = settings.num_train_timesteps // original
    distilled = np.arange(original, 0, -1) * stride - 1
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)
    timesteps = distilled[chosen]
    # LCM ends at its own estimate of x0, TCD at timestep 0.
    last = np.float32(1.0) if sampler == "lcm" else alphas[0]
    return sigmas_of(np.append(alphas[timesteps], last)), timesteps.astype(np.float64)


def _multistep_grid(
    sampler: SamplerName, settings: SamplerConfig, steps: int, alphas: Float32
) -> tuple[Floats, Floats]:
    """DPM-Solver++ and UniPC: whole timesteps; other sigmas span the whole training range."""
    train_sigmas = sigmas_of(alphas)
    train = settings.num_train_timesteps
    sigma_last = float(train_sigmas[0]) if settings.final_sigmas_type == "sigma_min" else 0.0
    schedule = _sigma_schedule(settings)
    lu = settings.use_lu_lambdas and schedule != "karras"
    if schedule == "default" and not lu:
        timesteps = spaced_timesteps(
            settings.timestep_spacing,
            steps,
            train,
            offset=settings.steps_offset,
            end=_clipped_end(settings, alphas),
            beyond=settings.timestep_spacing != "trailing",
        ).round()
        _check_range(timesteps, train)
        sigmas = np.interp(timesteps, np.arange(train), train_sigmas)
        return np.append(sigmas, sigma_last), timesteps
    if lu:  # evenly spaced lambdas, as exponential sigmas, but rounded otherwise
        high, low = (float(log_sigma) for log_sigma in np.log(train_sigmas[[-1, 0]]))
        sigmas = np.exp(high + np.linspace(0.0, 1.0, steps) * (low - high))
    else:
        sigmas = sigmas_between(schedule, *_ends(settings, train_sigmas[::-1]), steps)
    timesteps = timesteps_of(sigmas, train_sigmas)
    rounded = sampler == "unipc" or settings.beta_schedule != "squaredcos_cap_v2"
    if rounded and (lu or schedule == "karras"):
        timesteps = timesteps.round()
    if sampler == "unipc" and settings.final_sigmas_type == "sigma_min":
        sigma_last = float(sigmas[-1])
    return np.append(sigmas, sigma_last), np.trunc(timesteps)


def _sigma_grid(
    sampler: SamplerName, settings: SamplerConfig, steps: int, alphas: Float32
) -> tuple[Floats, Floats]:
    """Euler, Euler ancestral, Heun and LMS: fractional timesteps."""
    train_sigmas = sigmas_of(alphas)
    train = settings.num_train_timesteps
    timesteps = spaced_timesteps(
        settings.timestep_spacing, steps, train, offset=settings.steps_offset
    ).astype(np.float32)
    _check_range(timesteps, train)
    if settings.interpolation_type == "log_linear":
        high, low = np.log(train_sigmas[[-1, 0]])
        sigmas = np.exp(linspace32(float(high), float(low), steps + 1))
    else:
        sigmas = np.interp(timesteps, np.arange(train), train_sigmas)
    schedule = _sigma_schedule(settings)
    if schedule != "default":
        # diffusers' LMS lays its Karras sigmas between the grid's own ends in any case.
        own = sampler == "lms" and schedule == "karras"
        sigmas = sigmas_between(schedule, *_ends(settings, sigmas, own=own), steps)
        timesteps = timesteps_of(sigmas, train_sigmas).astype(np.float32)
    # diffusers takes log-linear sigmas one step further when timesteps are continuous.
    if len(sigmas) == steps or _has_continuous_timesteps(settings):
        sigma_last = float(train_sigmas[0]) if settings.final_sigmas_type == "sigma_min" else 0.0
        sigmas = np.append(sigmas, sigma_last)
    if _has_continuous_timesteps(settings):
        timesteps = np.float32(0.25) * np.log(sigmas[:-1].astype(np.float32))
    return sigmas, timesteps


def _sigma_schedule(settings: SamplerConfig) -> SigmaScheduleName:
    if settings.use_karras_sigmas:
        return "karras"
    return "exponential" if settings.use_exponential_sigmas else "default"


def _ends(settings: SamplerConfig, falling: Floats, *, own: bool = False) -> tuple[float, float]:
    """Return the largest and least sigma: the configuration's, or else (or ``own``) the grid's."""
    high, low = settings.sigma_max, settings.sigma_min
    if high is None or own:
        high = float(falling[0])
    if low is None or own:
        low = float(falling[-1])
    return high, low


def _has_continuous_timesteps(settings: SamplerConfig) -> bool:
    """Return whether the model is told log(sigma) / 4 instead of a training timestep."""
    return settings.timestep_type == "continuous" and settings.prediction_type == "v_prediction"


def _clipped_end(settings: SamplerConfig, alphas: Float32) -> int:
    """Return how many training timesteps have a log-SNR of at least lambda_min_clipped."""
    rising = (np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1.0) - alphas)))[::-1]
    clipped = int(np.searchsorted(rising, settings.lambda_min_clipped))
    if clipped >= len(alphas):
        raise RequestError(
            "lambda_min_clipped in scheduler_config.json leaves no timestep; lower it."
        )
    return settings.num_train_timesteps - clipped


def _check_range(timesteps: Floats, train: int) -> None:
    if timesteps[0] > train - 1 or timesteps[-1] < 0:
        raise RequestError(
            f"With this timestep spacing and steps_offset the timesteps run from {timesteps[-1]:g} "
            f"to {timesteps[0]:g}, outside 0 to {train - 1}; ask for fewer steps."
        )
