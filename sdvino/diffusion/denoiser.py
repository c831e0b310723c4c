"""The denoiser around the UNet: k-diffusion's contract, with the timestep carried along."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.scheduler_config import PredictionType
from sdvino.errors import ModelFolderError

Float32 = NDArray[np.float32]


class Predict(Protocol):
    """What the model says of latents, guidance included."""

    def __call__(self, x_in: Float32, t: float, /) -> Float32:
        """Return the raw prediction, float32 [N, C, h, w].

        Args:
            x_in: float32 [N, C, h, w], scaled to unit variance.
            t: the timestep, fractional for some samplers.
        """
        ...


class Denoise(Protocol):
    """What a sampler asks of the world: x0 as seen from x = x0 + sigma * eps."""

    def __call__(self, x: Float32, sigma: float, t: float, /) -> Float32:
        """Return the denoised latents, float32 [N, C, h, w]."""
        ...


class Denoiser:
    """Knows the model's input scaling and what its prediction means; nothing else does.

    Called with ``x`` (float32 [N, C, h, w], x = x0 + sigma * eps), ``sigma`` and the timestep ``t``
    that the model is to be told, it returns a fresh float32 array, its estimate of x0.

    At an infinite sigma (zero terminal SNR) x is the noise itself, of unit variance.

    Source: Karras et al. 2022, section 5, with the preconditioning of variance-preserving models;
    Salimans & Ho 2022 for v-prediction.
    """

    def __init__(self, predict: Predict, prediction_type: PredictionType = "epsilon") -> None:
        self._predict = predict
        self._prediction_type = prediction_type

    def __call__(self, x: Float32, sigma: float, t: float, /) -> Float32:
        """Return x0 as the model sees it from ``x`` at noise level ``sigma``."""
        scale = 1.0 / math.sqrt(sigma**2 + 1.0)  # sqrt(alpha_bar)
        x_in = x * np.float32(scale) if math.isfinite(sigma) else x
        prediction = self._predict(x_in, t)
        if prediction.shape != x.shape:
            raise ModelFolderError(
                f"The UNet predicts values of the shape {list(prediction.shape)} for latents of"
                f" {list(x.shape)}; get the model again."
            )
        denoised: Float32
        if self._prediction_type == "sample":
            denoised = np.array(prediction, np.float32)
        elif self._prediction_type == "epsilon":
            denoised = x - np.float32(sigma) * prediction
        elif math.isfinite(sigma):
            denoised = x_in * np.float32(scale) - np.float32(sigma * scale) * prediction
        else:
            denoised = -prediction
        return denoised
