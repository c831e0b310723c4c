"""diffusers is the oracle: the same model function, noise and grid give the same final latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle_schedulers import COMBINATIONS, Combination

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.scheduler_config import PredictionType, SchedulerConfig
from sdvino.errors import RequestError
from sdvino.settings import SAMPLERS, SamplerName
from tests.diffusion.oracle import (
    SHAPE,
    STABLE_DIFFUSION,
    Case,
    predict_at,
    relative_error,
    run_diffusers,
    run_sdvino,
)

TOLERANCE = 1e-5
NOT_PREDICTED = {("euler_ancestral", "sample"), ("pndm", "sample")}


def assert_same(config: dict[str, object], case: Case, tolerance: float = TOLERANCE) -> None:
    error = relative_error(run_sdvino(config, case), run_diffusers(config, case))
    assert error <= tolerance, f"{case}: {error:.1e}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_every_combination_as_diffusers(
    combination: Combination, prediction_type: PredictionType
) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction_type}
    sampler = combination.sampler
    if (sampler, prediction_type) in NOT_PREDICTED:
        with pytest.raises(RequestError, match=f"a model that predicts {prediction_type}"):
            run_sdvino(config, Case(sampler, 4))
        return
    for steps in (4, 8, 20):
        for eta in (0.0, 0.3, 1.0) if sampler in ("ddim", "tcd") else (0.0,):
            grid = (combination.timestep_spacing, combination.sigma_schedule)
            assert_same(config, Case(sampler, steps, *grid, eta))


# The settings of a scheduler_config.json that change the arithmetic, one by one.
SETTINGS: list[tuple[SamplerName, dict[str, object]]] = [
    ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}),
    ("ddim", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
    ("ddim", {"set_alpha_to_one": True, "steps_offset": 0}),
    ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
    ("ddim", {"beta_schedule": "linear", "num_train_timesteps": 500}),
    ("ddim", {"trained_betas": [0.001 + 0.00002 * i for i in range(1000)]}),
    ("euler", {"interpolation_type": "log_linear"}),
    ("euler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}),
    ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    (
        "euler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "interpolation_type": "log_linear",
        },
    ),
    ("euler", {"final_sigmas_type": "sigma_min"}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
    ("euler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("euler_ancestral", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("heun", {"clip_sample": True}),
    ("heun", {"beta_schedule": "exp"}),
    ("lms", {"use_karras_sigmas": True, "sigma_min": 0.1}),
    ("lms", {"use_exponential_sigmas": True, "sigma_min": 0.1}),
    ("dpmpp_2m", {"solver_order": 1}),
    ("dpmpp_2m", {"solver_order": 3}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"solver_type": "bh2"}),
    ("dpmpp_2m", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"use_lu_lambdas": True}),
    ("dpmpp_2m", {"use_lu_lambdas": True, "use_karras_sigmas": True}),
    ("dpmpp_2m", {"use_lu_lambdas": True, "use_exponential_sigmas": True}),
    ("dpmpp_2m", {"lambda_min_clipped": -2.0}),
    ("dpmpp_2m", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
    ("dpmpp_2m", {"thresholding": True}),
    ("dpmpp_2m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m_sde", {"solver_order": 1}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_order": 1}),
    ("unipc", {"solver_order": 3}),
    ("unipc", {"solver_order": 4}),
    ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"disable_corrector": [0, 2]}),
    ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"thresholding": True}),
    ("pndm", {"skip_prk_steps": False}),
    ("pndm", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
    ("pndm", {"set_alpha_to_one": True, "steps_offset": 0}),
    ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
    ("lcm", {"clip_sample": True}),
    ("lcm", {"thresholding": True}),
    ("lcm", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("tcd", {"original_inference_steps": 100}),
    ("tcd", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("sampler", "options"), SETTINGS, ids=str)
def test_settings_of_the_folder_as_diffusers(
    sampler: SamplerName, options: dict[str, object]
) -> None:
    for steps in (5, 16):
        # With zero terminal SNR sigma starts at 4096, where float32 keeps fewer digits of x0.
        tolerance = 1e-4 if "rescale_betas_zero_snr" in options else TOLERANCE
        assert_same({**STABLE_DIFFUSION, **options}, Case(sampler, steps, eta=0.3), tolerance)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_zero_terminal_snr_on_every_spacing(sampler: SamplerName, spacing: Any) -> None:
    for prediction_type in ("v_prediction", "sample"):
        options = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
        assert_same({**STABLE_DIFFUSION, **options}, Case(sampler, 8, spacing), 1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_folder_that_says_nothing(sampler: SamplerName) -> None:
    assert_same({}, Case(sampler, 6))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_two_and_fifty_steps(sampler: SamplerName) -> None:
    for steps in (1, 2, 3, 50):
        assert_same(dict(STABLE_DIFFUSION), Case(sampler, steps, eta=0.5))


def test_third_order_as_an_sde_is_the_papers_where_diffusers_is_not() -> None:
    # diffusers 0.39 has -1/2 instead of +1/2 in this weight, which then stays when h goes to 0.
    from sdvino.diffusion.samplers.dpmpp_2m import _weights

    h = 1e-3
    weights = _weights(h, 3, "midpoint")
    assert weights == pytest.approx([h, h / 2, h / 6], rel=2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_latents_given_are_left_alone_and_steps_share_no_memory(sampler: SamplerName) -> None:
    grid = make_grid(sampler, SchedulerConfig.from_dict(STABLE_DIFFUSION), 5)
    noise = make_noise("torch", 0)
    x = grid.initial(noise.randn(SHAPE))
    before = x.copy()
    denoise = Denoiser(predict_at, grid.prediction_type)
    steps = list(get_sampler(sampler)(denoise, x, grid, noise, eta=0.4))
    np.testing.assert_array_equal(x, before)
    arrays = [x, *(step.x for step in steps), *(step.denoised for step in steps)]
    for i, one in enumerate(arrays):
        assert not any(np.shares_memory(one, other) for other in arrays[i + 1 :])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_writing_into_the_state_changes_what_follows(sampler: SamplerName) -> None:
    grid = make_grid(sampler, SchedulerConfig.from_dict(STABLE_DIFFUSION), 3)
    ends = []
    for change in (0.0, 0.5):
        noise = make_noise("torch", 0)
        denoise = Denoiser(predict_at, grid.prediction_type)
        x = grid.initial(noise.randn(SHAPE))
        for step in get_sampler(sampler)(denoise, x, grid, noise):
            if step.index == 1:
                step.x[...] += change
            x = step.x
        ends.append(x)
    assert relative_error(ends[1], ends[0]) > 1e-3


def test_an_unknown_sampler_is_refused() -> None:
    unknown: Any = "ddpm"
    with pytest.raises(RequestError, match="choose one of: ddim, euler"):
        get_sampler(unknown)
