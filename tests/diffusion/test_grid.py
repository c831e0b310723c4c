from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.schedule import train_alphas_cumprod
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
from tests.diffusion.oracle import (
    SHAPE,
    STABLE_DIFFUSION,
    diffusers_config,
    predict_at,
    relative_error,
    third_party_warnings,
)

NO_SIGMAS = ("ddim", "euler_ancestral", "pndm", "lcm", "tcd")


def grid_of(sampler: SamplerName, steps: int = 8, **options: Any) -> Grid:
    chosen = {key: options.pop(key, None) for key in ("sigma_schedule", "timestep_spacing")}
    config = SchedulerConfig.from_dict({**STABLE_DIFFUSION, **options})
    return make_grid(sampler, config, steps, **chosen)


def sigmas_of(grid: Grid) -> list[float]:
    """Noise over picture, as diffusers' schedulers count sigmas of either kind."""
    return [math.exp(-level.lam) for level in grid.levels]


def timesteps_of(grid: Grid) -> list[float]:
    return [level.t for level in grid.levels[:-1]]


@given(
    sampler=st.sampled_from(SAMPLERS),
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    sigma_schedule=st.sampled_from(SIGMA_SCHEDULES),
    steps=st.integers(1, 1000),
    offset=st.integers(0, 2),
)
@settings(deadline=None, max_examples=300)
def test_noise_falls_and_timesteps_stay_in_range(
    sampler: SamplerName,
    spacing: TimestepSpacing,
    sigma_schedule: SigmaScheduleName,
    steps: int,
    offset: int,
) -> None:
    try:
        grid = grid_of(
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
    assert grid.steps == steps
    lams = [level.lam for level in grid.levels]
    assert np.all(np.diff(lams[:-1]) > 0)
    assert lams[-1] >= lams[-2]
    t = timesteps_of(grid)
    assert t == sorted(t, reverse=True)
    assert 0 <= t[-1] <= t[0] <= 999
    number = {value: i for i, value in enumerate(dict.fromkeys(t))}
    assert [level.step for level in grid.levels[:-1]] == [number[value] for value in t]
    exploding = sampler in ("euler", "euler_ancestral", "heun", "lms")
    for level in grid.levels:
        assert math.isclose(level.alpha**2 + (0 if exploding else level.sigma**2), 1.0)
    if sampler not in ("ddim", "pndm", "tcd"):
        assert (grid.levels[-1].alpha, grid.levels[-1].sigma) == (1.0, 0.0)


def test_the_first_karras_timesteps_differ_by_sampler() -> None:
    options: dict[str, Any] = {"sigma_schedule": "karras", "timestep_spacing": "linspace"}
    assert timesteps_of(grid_of("euler", 4, **options))[1] == pytest.approx(687.15, abs=0.01)
    assert timesteps_of(grid_of("dpmpp_2m", 4, **options))[1] == 687.0


def test_evaluations() -> None:
    assert grid_of("heun", 4).evaluations == 7
    assert grid_of("pndm", 4).evaluations == 5
    assert grid_of("pndm", 1).evaluations == 1
    assert grid_of("pndm", 4, skip_prk_steps=False).evaluations == 13
    assert grid_of("unipc", 4).evaluations == 4


@pytest.mark.parametrize(
    ("sampler", "options", "steps"),
    [
        ("euler", {}, [0, 1, 2, 3, 4]),
        ("heun", {}, [0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ("pndm", {}, [0, 1, 1, 2, 3, 4]),
        (
            "pndm",
            {"skip_prk_steps": False},
            [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7],
        ),
    ],
)
def test_evaluations_at_one_timestep_share_a_step(
    sampler: SamplerName, options: dict[str, Any], steps: list[int]
) -> None:
    asked: list[Level] = []

    def denoise(x: Float32, level: Level) -> Float32:
        asked.append(level)
        half: Float32 = x * np.float32(0.5)
        return half

    grid = grid_of(sampler, 5, **options)
    list(get_sampler(sampler)(denoise, np.ones(SHAPE, np.float32), grid, make_noise("torch", 0)))
    assert [level.step for level in asked] == steps
    assert len({level.t for level in asked}) == steps[-1] + 1


def test_what_ddim_and_pndm_end_at() -> None:
    assert grid_of("ddim", 4, set_alpha_to_one=True).levels[-1].sigma == 0.0
    grid = grid_of("pndm", 4)
    assert grid.trained(-1) == replace(grid.trained(0), t=-1.0)
    assert grid.trained(-100).alpha == grid.trained(0).alpha
    assert sigmas_of(grid)[-1] == pytest.approx(0.0292, abs=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_initial_scale_is_diffusers(sampler: SamplerName, spacing: TimestepSpacing) -> None:
    from oracle_schedulers import oracle_scheduler

    if sampler in ("lcm", "tcd") and spacing != "leading":
        return
    with third_party_warnings():
        theirs = oracle_scheduler(STABLE_DIFFUSION, sampler, spacing)
        theirs.set_timesteps(8)
    grid = grid_of(sampler, timestep_spacing=spacing)
    assert grid.init_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    noise = np.ones((1, 4, 2, 2), np.float64)
    x = grid.initial(noise)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, grid.init_scale, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_noised_as_diffusers_does(sampler: SamplerName) -> None:
    from oracle_schedulers import oracle_scheduler

    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    grid = grid_of(sampler).start(0.6)
    assert (grid.begin, grid.steps) == (4, 8)
    with third_party_warnings():
        theirs = oracle_scheduler(STABLE_DIFFUSION, sampler)
        theirs.set_timesteps(8)
        told = torch.tensor([grid.levels[grid.begin].t])
        if sampler in ("ddim", "pndm", "lcm", "tcd"):
            told = told.long()
        expected = theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), told)
    np.testing.assert_allclose(grid.initial(noise, x0), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_a_grid_begun_later_is_its_own_last_steps(sampler: SamplerName, strength: float) -> None:
    """A picture that the model knows comes back from whatever level it was noised to."""
    grid = grid_of(sampler, 10).start(strength)
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal(SHAPE).astype(np.float32)
    noise = make_noise("torch", 0)
    asked: list[Level] = []

    def denoise(x: Float32, level: Level) -> Float32:
        asked.append(level)
        kept: Float32 = x0.copy()
        return kept

    x = grid.initial(noise.randn(SHAPE), x0)
    steps = list(get_sampler(sampler)(denoise, x, grid, noise))
    assert [step.index for step in steps] == list(range(grid.begin, 10))
    assert len(asked) == grid.evaluations
    assert asked[0].t == grid.levels[grid.begin].t
    assert relative_error(steps[-1].x, x0) < 0.05  # the end of the grid may keep some noise


def test_no_step_left_is_said() -> None:
    with pytest.raises(RequestError, match="Of 8 steps none is left"):
        grid_of("euler").start(0.1)


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
    ddim = grid_of("ddim", timestep_spacing="trailing", **options)
    assert ddim.trained(999) == Level(0, 0.0, 1.0, 999.0)
    assert ddim.levels[0] == Level(0, 0.0, 1.0, 999.0)
    euler = grid_of("euler", timestep_spacing="trailing", **options)
    assert euler.levels[0].sigma == pytest.approx(4096.0, rel=1e-6)
    with pytest.raises(RequestError, match="choose the timestep spacing leading"):
        grid_of("ddim", timestep_spacing="trailing", rescale_betas_zero_snr=True)


def test_pure_noise_needs_no_arithmetic_of_its_own() -> None:
    """DDIM from alpha = 0 is DDIM from an alpha that is next to nothing."""
    config: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    grid = grid_of("ddim", timestep_spacing="trailing", **config)
    first = replace(grid.levels[0], alpha=1e-5)
    ends = []
    for levels in (grid.levels, (first, *grid.levels[1:])):
        noise = make_noise("torch", 0)
        begun = replace(grid, levels=levels)
        denoise = Denoiser(predict_at, "v_prediction")
        x = begun.initial(noise.randn(SHAPE))
        ends.append(list(get_sampler("ddim")(denoise, x, begun, noise))[-1].x)
    assert relative_error(*ends) < 1e-3


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
        grid_of(sampler, steps, **options)


@pytest.mark.parametrize("steps", [1.5, "8", None, True])
def test_steps_must_be_whole(steps: Any) -> None:
    with pytest.raises(RequestError, match="give euler a whole number"):
        grid_of("euler", steps)


def test_an_unknown_sampler_is_refused() -> None:
    unknown: Any = "plms"
    with pytest.raises(RequestError, match="Unknown scheduler 'plms'"):
        grid_of(unknown)


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
        grid_of(sampler, **betas, rescale_betas_zero_snr=True)


def test_final_latents_are_finite_and_their_own() -> None:
    grid = grid_of("euler")
    x = np.ones((1, 4, 2, 2), np.float32)
    final = grid.final(x)
    assert not np.shares_memory(x, final)
    np.testing.assert_array_equal(x, final)
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(SdvinoError, match="not finite after 8 steps of euler"):
        grid.final(x)
