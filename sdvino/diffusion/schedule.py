"""The noise schedule of the training, and how timesteps and sigmas are chosen from it.

Rounding is part of the contract: where diffusers computes in float32, so do these.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.scheduler_config import SamplerConfig
from sdvino.errors import ModelFolderError
from sdvino.settings import SigmaScheduleName, TimestepSpacing

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

#: What stands for zero as the last cumulative alpha, where a sampler must divide by it.
_SMALLEST_ALPHA = 2.0**-24
_KARRAS_RHO = 7.0


def train_alphas_cumprod(config: SamplerConfig, *, keep_zero: bool) -> Float32:
    """Return the cumulative products of 1 - beta over the training timesteps.

    Args:
        config: ``beta_schedule``, ``beta_start``, ``beta_end``, ``trained_betas`` and
            ``rescale_betas_zero_snr`` are read.
        keep_zero: with zero terminal SNR, leave the last one exactly 0 (DDIM, LCM, TCD) instead of
            2**-24 (all others).

    Returns:
        float32 [num_train_timesteps], falling.

    Raises:
        ModelFolderError: ``trained_betas`` has another length than ``num_train_timesteps``, or
            the noise levels are not distinct.
    """
    betas = _betas(config)
    if len(betas) != config.num_train_timesteps:
        raise ModelFolderError(
            f"scheduler_config.json has {len(betas)} trained_betas for "
            f"{config.num_train_timesteps} training timesteps; the two must agree."
        )
    alphas_cumprod = _cumprod(np.float32(1.0) - betas)
    if alphas_cumprod[0] >= 1.0 or alphas_cumprod[-1] <= 0.0 or _repeats(alphas_cumprod):
        raise ModelFolderError(
            "The betas of scheduler_config.json are so small or large that float32 cannot tell the "
            "noise levels apart; correct beta_start and beta_end."
        )
    if config.rescale_betas_zero_snr:
        alphas_cumprod = _cumprod(np.float32(1.0) - _rescale_zero_terminal_snr(alphas_cumprod))
    if config.rescale_betas_zero_snr and not keep_zero:
        alphas_cumprod[-1] = _SMALLEST_ALPHA
    return alphas_cumprod


def _betas(config: SamplerConfig) -> Float32:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":
        return linspace32(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        root = linspace32(math.sqrt(config.beta_start), math.sqrt(config.beta_end), count)
        return np.square(root)
    edges = np.arange(count + 1) / count
    if config.beta_schedule == "exp":
        alpha_bar = np.exp(-12.0 * edges)
    else:  # squaredcos_cap_v2: Nichol & Dhariwal 2021, "Improved DDPM"
        alpha_bar = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas.astype(np.float32)


def linspace32(start: float, end: float, count: int) -> Float32:
    """Return torch.linspace's float32 numbers: from both ends inwards, each rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(count - 1))
    i = np.arange(count)
    rising = float(first) + step * i
    falling = float(last) - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)


def _cumprod(alphas: Float32) -> Float32:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _repeats(falling: Float32) -> bool:
    return bool(np.any(falling[1:] >= falling[:-1]))


def _rescale_zero_terminal_snr(alphas_cumprod: Float32) -> Float32:
    """Return betas such that nothing of the picture is left at the last timestep.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root * root
    ratios = alphas_cumprod[1:] / alphas_cumprod[:-1]
    rescaled: Float32 = np.float32(1.0) - np.concatenate([alphas_cumprod[:1], ratios])
    return rescaled


def sigmas_of(alphas_cumprod: Float32) -> Float32:
    """Return sqrt((1 - a) / a), the noise level in x = x0 + sigma * eps; infinite where a is 0."""
    with np.errstate(divide="ignore"):
        sigmas: Float32 = np.sqrt((np.float32(1.0) - alphas_cumprod) / alphas_cumprod)
    return sigmas


def spaced_timesteps(
    spacing: TimestepSpacing,
    steps: int,
    train: int,
    *,
    offset: int = 0,
    end: int | None = None,
    beyond: bool = False,
) -> Float64:
    """Thin ``train`` timesteps out to ``steps`` of them, largest first; linspace's are fractional.

    Args:
        spacing: the three ways of diffusers (Lin et al. 2023, table 2).
        steps: how many.
        train: how many timesteps the model was trained on.
        offset: added for ``leading``.
        end: leave out the training timesteps from this one on.
        beyond: space as if the end of the grid (timestep 0) were one more step and leave it out,
            as the multistep solvers do.

    Returns:
        float64 [steps], or fewer for ``trailing`` when ``end`` cuts some off.
    """
    last = train if end is None else end
    count = steps + 1 if beyond else steps
    if spacing == "linspace":
        timesteps: NDArray[np.floating] = np.linspace(0, last - 1, count)[::-1]
    elif spacing == "leading":
        timesteps = np.arange(count)[::-1] * float(last // count) + offset
    else:
        timesteps = np.arange(float(last), 0.0, -train / steps).round() - 1.0
    return timesteps[:steps].astype(np.float64)


def sigmas_between(
    name: SigmaScheduleName, sigma_max: float, sigma_min: float, steps: int
) -> Float64:
    """Return ``steps`` sigmas from ``sigma_max`` down to ``sigma_min``, both included.

    ``karras``: Karras et al. 2022, "Elucidating the Design Space", equation 5, rho = 7.
    ``exponential``: evenly spaced logarithms.
    """
    if name == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    ramp = np.linspace(0.0, 1.0, steps)
    high, low = sigma_max ** (1 / _KARRAS_RHO), sigma_min ** (1 / _KARRAS_RHO)
    sigmas: Float64 = (high + ramp * (low - high)) ** _KARRAS_RHO
    return sigmas


def timesteps_of(sigmas: Float64, train_sigmas: Float32) -> Float64:
    """Return the fractional timesteps whose noise levels are ``sigmas``, linear in log sigma."""
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    log_train = np.log(train_sigmas)
    # The last one at or below. (With zero terminal SNR the last few may be out of order.)
    reached = log_sigmas[:, None] >= log_train
    low = np.where(reached.any(axis=1), len(log_train) - 1 - reached[:, ::-1].argmax(axis=1), 0)
    low = np.minimum(low, len(log_train) - 2)
    gap = log_train[low] - log_train[low + 1]
    w = np.clip((log_train[low] - log_sigmas) / gap, 0.0, 1.0)
    timesteps: Float64 = (1.0 - w) * low + w * (low + 1)
    return timesteps
