from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.scheduler_config import PredictionType
from sdvino.errors import ModelFolderError

Float32 = NDArray[np.float32]
TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def numbers(seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((2, 4, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_model_that_knows_the_answer_is_understood(
    prediction_type: PredictionType, sigma: float
) -> None:
    x0, eps = numbers(0), numbers(1)
    x = x0 + np.float32(sigma) * eps
    alpha = 1.0 / math.sqrt(1.0 + sigma**2)
    answers: dict[str, Float32] = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": np.float32(alpha) * eps - np.float32(sigma * alpha) * x0,
    }
    seen: list[tuple[Float32, float]] = []

    def predict(x_in: Float32, t: float) -> Float32:
        seen.append((x_in, t))
        return answers[prediction_type]

    denoised = Denoiser(predict, prediction_type)(x, sigma, 687.15)
    assert denoised.dtype == np.float32
    np.testing.assert_allclose(denoised, x0, atol=1e-5)
    [(x_in, t)] = seen
    assert t == 687.15
    np.testing.assert_allclose(x_in, x * np.float32(alpha), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_is_given_as_it_is(prediction_type: PredictionType) -> None:
    x0, eps = numbers(0), numbers(1)
    inputs: list[Float32] = []

    def predict(x_in: Float32, t: float) -> Float32:
        inputs.append(x_in)
        answer: Float32 = np.negative(x0) if prediction_type == "v_prediction" else x0
        return answer

    denoised = Denoiser(predict, prediction_type)(eps, math.inf, 999.0)
    np.testing.assert_array_equal(denoised, x0)
    np.testing.assert_array_equal(inputs[0], eps)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_result_outlives_the_models_output_buffer(prediction_type: PredictionType) -> None:
    buffer = numbers(0)
    x = numbers(1)
    before = x.copy()
    denoised = Denoiser(lambda x_in, t: buffer, prediction_type)(x, 2.0, 500.0)
    kept = denoised.copy()
    buffer[...] = 0.0
    np.testing.assert_array_equal(denoised, kept)
    np.testing.assert_array_equal(x, before)


def test_a_prediction_of_another_shape_is_refused() -> None:
    denoise = Denoiser(lambda x, t: x[..., ::2, ::2])
    with pytest.raises(ModelFolderError, match="predicts values of the shape"):
        denoise(np.zeros((1, 4, 8, 8), np.float32), 1.0, 999.0)
