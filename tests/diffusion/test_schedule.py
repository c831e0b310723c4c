from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdvino.diffusion.grids import train_alphas_cumprod
from sdvino.diffusion.schedule import Schedule, final_latents, initial_latents, make_schedule
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.settings import (
    SAMPLERS,
    SIGMA_SCHEDULES,
    TIMESTEP_SPACINGS,
    SamplerName,
    SigmaScheduleName,
    TimestepSpacing,
)
from tests.diffusion.oracle import STABLE_DIFFUSION, diffusers_config, third_party_warnings

NO_SIGMAS = ("ddim", "euler_ancestral", "pndm", "lcm", "tcd")


def schedule_of(sampler: SamplerName, steps: int = 8, **options: Any) -> Schedule:
    chosen = {key: options.pop(key, None) for key in ("sigma_schedule", "timestep_spacing")}
    config = SchedulerConfig.from_dict({**STABLE_DIFFUSION, **options})
    return make_schedule(sampler, config, steps, **chosen)


@given(
    sampler=st.sampled_from(SAMPLERS),
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    sigma_schedule=st.sampled_from(SIGMA_SCHEDULES),
    steps=st.integers(1, 1000),
    offset=st.integers(0, 2),
)
@settings(deadline=None, max_examples=300)
def test_sigmas_fall_and_timesteps_stay_in_range(
    sampler: SamplerName,
    spacing: TimestepSpacing,
    sigma_schedule: SigmaScheduleName,
    steps: int,
    offset: int,
) -> None:
    try:
        schedule = schedule_of(
            sampler,
            steps,
            sigma_schedule=sigma_schedule,
            timestep_spacing=spacing,
            steps_offset=offset,
        )
    except RequestError:
        # Refused: a pair that diffusers lacks, or so many steps that levels would repeat.
        lacking = sigma_schedule != "default" and sampler in NO_SIGMAS
        lacking |= spacing != "leading" and sampler in ("lcm", "tcd")
        assert lacking or steps > (50 if sampler in ("lcm", "tcd") else 300)
        return
    assert schedule.steps == steps
    assert len(schedule.sigmas) == steps + 1
    assert np.all(np.diff(schedule.sigmas[:-1]) < 0)
    assert schedule.sigmas[-1] <= schedule.sigmas[-2]
    assert np.all(np.diff(schedule.timesteps) <= 0)
    assert np.all((schedule.timesteps >= 0) & (schedule.timesteps <= 999))
    if sampler not in ("ddim", "pndm", "tcd"):
        assert schedule.sigmas[-1] == 0.0


def test_the_first_karras_timesteps_differ_by_sampler() -> None:
    euler = schedule_of("euler", 4, sigma_schedule="karras", timestep_spacing="linspace")
    dpmpp = schedule_of("dpmpp_2m", 4, sigma_schedule="karras", timestep_spacing="linspace")
    assert euler.timesteps[1] == pytest.approx(687.15, abs=0.01)
    assert dpmpp.timesteps[1] == 687.0
    assert euler.timesteps.dtype == euler.sigmas.dtype == np.float32


def test_evaluations() -> None:
    assert schedule_of("heun", 4).evaluations == 7
    assert schedule_of("pndm", 4).evaluations == 5
    assert schedule_of("pndm", 1).evaluations == 1
    assert schedule_of("pndm", 4, skip_prk_steps=False).evaluations == 13
    assert schedule_of("unipc", 4).evaluations == 4


def test_what_ddim_and_pndm_end_at() -> None:
    assert schedule_of("ddim", 4, set_alpha_to_one=True).sigmas[-1] == 0.0
    schedule = schedule_of("pndm", 4)
    assert schedule.alpha_cumprod(-1) == schedule.alphas_cumprod[0] == schedule.alpha_cumprod(0)
    assert schedule.sigmas[-1] == pytest.approx(0.0292, abs=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_initial_scale_is_diffusers(sampler: SamplerName, spacing: TimestepSpacing) -> None:
    from oracle_schedulers import oracle_scheduler

    if sampler in ("lcm", "tcd") and spacing != "leading":
        return
    with third_party_warnings():
        theirs = oracle_scheduler(STABLE_DIFFUSION, sampler, spacing)
        theirs.set_timesteps(8)
    schedule = schedule_of(sampler, timestep_spacing=spacing)
    assert schedule.init_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    noise = np.ones((1, 4, 2, 2), np.float64)
    x = initial_latents(noise, schedule)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, schedule.init_scale, rtol=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_are_torchs_to_the_bit(beta_schedule: str) -> None:
    config = diffusers_config("ddim", beta_schedule=beta_schedule)
    from diffusers import DDIMScheduler

    theirs: torch.Tensor = DDIMScheduler.from_config(config).alphas_cumprod
    settings = SchedulerConfig.from_dict(config).for_sampler("ddim")
    ours = train_alphas_cumprod(settings, keep_zero=True)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_zero_terminal_snr_ends_at_zero_only_where_nothing_divides_by_it() -> None:
    options: dict[str, Any] = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    ddim = schedule_of("ddim", timestep_spacing="trailing", **options)
    assert ddim.alphas_cumprod[-1] == 0.0
    assert math.isinf(ddim.sigmas[0])
    euler = schedule_of("euler", timestep_spacing="trailing", **options)
    assert euler.alphas_cumprod[-1] == 2.0**-24
    assert euler.sigmas[0] == pytest.approx(4096.0, rel=1e-6)
    with pytest.raises(RequestError, match="choose the timestep spacing leading"):
        schedule_of("ddim", timestep_spacing="trailing", rescale_betas_zero_snr=True)


def test_the_noise_level_of_a_timestep() -> None:
    schedule = schedule_of("euler", sigma_schedule="karras")
    for sigma, t in zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=False):
        assert schedule.sigma_at(t) == pytest.approx(sigma, rel=2e-3)
    continuous = schedule_of("euler", timestep_type="continuous", prediction_type="v_prediction")
    t = float(continuous.timesteps[2])
    assert continuous.sigma_at(t) == pytest.approx(float(continuous.sigmas[2]), rel=1e-5)


REFUSED: list[tuple[SamplerName, int, dict[str, Any], str]] = [
    ("ddim", 0, {}, "from 1 to 1000"),
    ("ddim", -3, {}, "from 1 to 1000"),
    ("ddim", 1001, {}, "from 1 to 1000"),
    ("lcm", 51, {}, "from 1 to 50"),
    ("pndm", 3, {"skip_prk_steps": False}, "from 4 to 1000"),
    ("ddim", 8, {"sigma_schedule": "karras"}, "choose one of: euler, heun, lms"),
    ("euler_ancestral", 8, {"sigma_schedule": "exponential"}, "choose one of: euler, heun"),
    ("lcm", 8, {"timestep_spacing": "trailing"}, "leave out the timestep spacing"),
    ("euler_ancestral", 8, {"prediction_type": "sample"}, "choose ddim, euler or dpmpp_2m"),
    ("pndm", 8, {"prediction_type": "sample"}, "choose ddim, euler or dpmpp_2m"),
    ("euler", 8, {"use_beta_sigmas": True}, "beta sigmas"),
    ("dpmpp_2m", 8, {"variance_type": "learned"}, "choose the scheduler ddim"),
    ("unipc", 8, {"predict_x0": False}, "choose the scheduler ddim"),
    ("dpmpp_2m", 1000, {}, "repeat noise levels"),
    ("ddim", 8, {"steps_offset": 500}, "outside 0 to 999"),
    ("dpmpp_2m", 8, {"lambda_min_clipped": 50.0}, "leaves no timestep"),
    ("tcd", 8, {"original_inference_steps": 2000}, "original_inference_steps is 2000"),
]


@pytest.mark.parametrize(("sampler", "steps", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    sampler: SamplerName, steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        schedule_of(sampler, steps, **options)


@pytest.mark.parametrize("steps", [1.5, "8", None, True])
def test_steps_must_be_whole(steps: Any) -> None:
    with pytest.raises(RequestError, match="give euler a whole number"):
        schedule_of("euler", steps)


def test_an_unknown_sampler_is_refused() -> None:
    unknown: Any = "plms"
    with pytest.raises(RequestError, match="Unknown scheduler 'plms'"):
        schedule_of(unknown)


@pytest.mark.parametrize(
    "betas",
    [
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"trained_betas": [0.999] * 1000},
        {"beta_start": 1e-12, "beta_end": 1e-12},
        {"beta_start": 0.99, "beta_end": 0.99},
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_betas_that_make_no_grid_are_refused(sampler: SamplerName, betas: dict[str, Any]) -> None:
    with pytest.raises(ModelFolderError, match=r"scheduler_config\.json"):
        schedule_of(sampler, **betas, rescale_betas_zero_snr=True)


def test_final_latents_are_finite_and_their_own() -> None:
    schedule = schedule_of("euler")
    x = np.ones((1, 4, 2, 2), np.float32)
    final = final_latents(x, schedule)
    assert not np.shares_memory(x, final)
    np.testing.assert_array_equal(x, final)
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(SdvinoError, match="not finite after 8 steps of euler"):
        final_latents(x, schedule)
