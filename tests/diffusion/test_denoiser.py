from __future__ import annotations

import math

import numpy as np
import pytest

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.grid import Float32, Level
from sdvino.diffusion.scheduler_config import PredictionType
from sdvino.errors import ModelFolderError

TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def numbers(seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((2, 4, 3, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("alpha", "sigma"), [(1.0, 0.03), (1.0, 1.0), (1.0, 14.6), (0.6, 0.8), (0.96, 0.28), (0.5, 2.0)]
)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_model_that_knows_the_answer_is_understood(
    prediction_type: PredictionType, alpha: float, sigma: float
) -> None:
    x0, eps = numbers(0), numbers(1)
    level = Level(3, alpha, sigma, 687.15)
    x = level.noised(x0, eps)
    norm = math.hypot(alpha, sigma)
    answers: dict[str, Float32] = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": np.float32(alpha / norm) * eps - np.float32(sigma / norm) * x0,
    }
    seen: list[tuple[Float32, Level]] = []

    def predict(x_in: Float32, level: Level) -> Float32:
        seen.append((x_in, level))
        return answers[prediction_type]

    denoised = Denoiser(predict, prediction_type)(x, level)
    assert denoised.dtype == np.float32
    np.testing.assert_allclose(denoised, x0, atol=1e-5)
    [(x_in, told)] = seen
    assert told is level
    np.testing.assert_allclose(x_in, x / np.float32(norm), rtol=1e-6)
    np.testing.assert_allclose(level.eps(x, x0), eps, atol=1e-4)


def test_a_flow_is_told_x_as_it_is() -> None:
    x0, eps = numbers(0), numbers(1)
    for sigma in (1.0, 0.7, 0.01):
        level = Level(0, 1.0 - sigma, sigma, 1000.0 * sigma)
        x = level.noised(x0, eps)
        inputs: list[Float32] = []

        def predict(x_in: Float32, level: Level, kept: list[Float32] = inputs) -> Float32:
            kept.append(x_in)
            return eps - x0

        denoised = Denoiser(predict, "flow_prediction")(x, level)
        np.testing.assert_allclose(denoised, x0, atol=1e-6)
        np.testing.assert_array_equal(inputs[0], x)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_is_given_as_it_is(prediction_type: PredictionType) -> None:
    x0, eps = numbers(0), numbers(1)
    level = Level(0, 0.0, 1.0, 999.0)
    inputs: list[Float32] = []

    def predict(x_in: Float32, level: Level) -> Float32:
        inputs.append(x_in)
        answer: Float32 = np.negative(x0) if prediction_type == "v_prediction" else x0
        return answer

    denoised = Denoiser(predict, prediction_type)(eps, level)
    np.testing.assert_array_equal(denoised, x0)
    np.testing.assert_array_equal(inputs[0], eps)
    np.testing.assert_array_equal(level.eps(eps, x0), eps)
    assert level.lam == -math.inf


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_result_outlives_the_models_output_buffer(prediction_type: PredictionType) -> None:
    buffer = numbers(0)
    x = numbers(1)
    before = x.copy()
    denoised = Denoiser(lambda x_in, level: buffer, prediction_type)(x, Level(0, 1.0, 2.0, 500.0))
    kept = denoised.copy()
    buffer[...] = 0.0
    np.testing.assert_array_equal(denoised, kept)
    np.testing.assert_array_equal(x, before)


def test_a_prediction_of_another_shape_is_refused() -> None:
    denoise = Denoiser(lambda x, level: x[..., ::2, ::2])
    with pytest.raises(ModelFolderError, match="predicts values of the shape"):
        denoise(np.zeros((1, 4, 8, 8), np.float32), Level(0, 1.0, 1.0, 999.0))
