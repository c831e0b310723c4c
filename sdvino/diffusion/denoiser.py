"""The denoiser around the network: k-diffusion's contract, over any noise process."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from sdvino.diffusion.grid import Float32, Level
from sdvino.diffusion.scheduler_config import PredictionType
from sdvino.errors import ModelFolderError


class Predict(Protocol):
    """What the model says of latents, guidance included."""

    def __call__(self, x_in: Float32, level: Level, /) -> Float32:
        """Return the raw prediction, float32 [N, C, h, w].

        Args:
            x_in: float32 [N, C, h, w], scaled as the model takes it.
            level: where ``x_in`` comes from; the model is told its ``t``.
        """
        ...


class Denoise(Protocol):
    """What a sampler asks of the world: the x0 in x = alpha x0 + sigma eps."""

    def __call__(self, x: Float32, level: Level, /) -> Float32:
        """Return the denoised latents, float32 [N, C, h, w], an array of their own."""
        ...


class Denoiser:
    """Knows the model's input scaling and what its prediction means; nothing else does.

    A model of variance-preserving diffusion takes x at unit variance (over the root of
    alpha**2 + sigma**2), one of flow matching takes it as it is.

    Source: Karras et al. 2022, section 5, with the preconditioning of variance-preserving models;
    Salimans & Ho 2022 for v-prediction; Lipman et al. 2023 for flow matching.
    """

    def __init__(self, predict: Predict, prediction_type: PredictionType = "epsilon") -> None:
        self._predict = predict
        self._prediction_type = prediction_type

    def __call__(self, x: Float32, level: Level, /) -> Float32:
        """Return x0 as the model sees it from ``x`` at ``level``, float32 [N, C, h, w]."""
        if self._prediction_type == "flow_prediction":  # of eps - x0
            flowed: Float32 = x - np.float32(level.sigma) * self._ask(x, level)
            return flowed
        norm = math.sqrt(level.alpha**2 + level.sigma**2)
        # Over alpha first, where norm alone would do: quantized networks turn a last bit of their
        # input into another picture, and this is the rounding that their pictures were made with.
        scaled = x * np.float32(level.gain)
        x_in = scaled * np.float32(1.0 / (level.gain * norm))
        prediction = self._ask(x_in, level)
        denoised: Float32
        if self._prediction_type == "sample":
            denoised = np.array(prediction, np.float32)
        elif self._prediction_type == "epsilon":
            denoised = scaled - np.float32(level.sigma * level.gain) * prediction
        else:  # v, alpha eps - sigma x0 at unit variance
            denoised = x_in * np.float32(level.alpha / norm)
            denoised -= np.float32(level.sigma / norm) * prediction
        return denoised

    def _ask(self, x_in: Float32, level: Level) -> Float32:
        prediction = self._predict(x_in, level)
        if prediction.shape != x_in.shape:
            raise ModelFolderError(
                f"The UNet predicts values of the shape {list(prediction.shape)} for latents of"
                f" {list(x_in.shape)}; get the model again."
            )
        return prediction
