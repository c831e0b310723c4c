"""The grid of each kind of sampler: which noise levels and timesteps it steps through."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.grids import (
    Float32,
    linspace32,
    sigmas_between,
    sigmas_of,
    spaced_timesteps,
    timesteps_of,
)
from sdvino.diffusion.scheduler_config import SamplerConfig
from sdvino.errors import RequestError
from sdvino.settings import SamplerName, SigmaScheduleName

Floats = NDArray[np.floating]

MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
DISTILLED = ("lcm", "tcd")


def lay_grid(
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
    if sampler in MULTISTEP:
        return _multistep_grid(sampler, settings, steps, alphas)
    return _sigma_grid(sampler, settings, steps, alphas)


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
    if len(sigmas) == steps or has_continuous_timesteps(settings):
        sigma_last = float(train_sigmas[0]) if settings.final_sigmas_type == "sigma_min" else 0.0
        sigmas = np.append(sigmas, sigma_last)
    if has_continuous_timesteps(settings):
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


def has_continuous_timesteps(settings: SamplerConfig) -> bool:
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
