from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdvino.diffusion.denoiser import Predict
from sdvino.diffusion.grid import Float32, Grid, Level
from sdvino.diffusion.guidance import Guidance, combine, interval_of_steps
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.settings import SamplerName
from tests.diffusion.oracle import STABLE_DIFFUSION

LEVEL = Level(0, 0.8, 0.6, 5.0)


def numbers(seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((2, 4, 8, 8)).astype(np.float32)


COND, UNCOND = numbers(0), numbers(1)


def saying(answer: Float32, calls: list[float]) -> Predict:
    def predict(x_in: Float32, level: Level) -> Float32:
        calls.append(level.t)
        return answer

    return predict


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_combine_as_diffusers(rescale: float) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, uncond = torch.from_numpy(COND), torch.from_numpy(UNCOND)
    theirs = uncond + 7.5 * (cond - uncond)
    if rescale > 0.0:
        theirs = rescale_noise_cfg(theirs, cond, guidance_rescale=rescale)
    ours = combine(COND, UNCOND, 7.5, rescale)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_a_picture_is_rescaled_by_itself() -> None:
    alone = combine(COND[:1], UNCOND[:1], 7.5, 0.5)
    np.testing.assert_allclose(combine(COND, UNCOND, 7.5, 0.5)[:1], alone, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_one_run_is_enough_up_to_one(scale: float) -> None:
    calls: list[float] = []
    unneeded: list[float] = []
    guidance = Guidance(saying(COND, calls), saying(UNCOND, unneeded), guidance_scale=scale)
    np.testing.assert_array_equal(guidance(COND, LEVEL), COND)
    assert (calls, unneeded) == ([5.0], [])
    assert not guidance.guides(LEVEL)


def test_two_runs_above_one() -> None:
    calls: list[float] = []
    guidance = Guidance(saying(COND, calls), saying(UNCOND, calls), guidance_scale=3.0)
    np.testing.assert_array_equal(guidance(COND, LEVEL), combine(COND, UNCOND, 3.0))
    assert calls == [5.0, 5.0]


def test_both_at_once() -> None:
    calls: list[float] = []
    guidance = Guidance(
        saying(COND, calls), both=lambda x_in, level: (COND, UNCOND), guidance_scale=3.0
    )
    np.testing.assert_array_equal(guidance(COND, LEVEL), combine(COND, UNCOND, 3.0))
    assert calls == []


def test_a_component_may_reuse_its_output() -> None:
    buffer = np.empty_like(COND)

    def says(answer: Float32) -> Predict:
        def predict(x_in: Float32, level: Level) -> Float32:
            buffer[...] = answer
            return buffer

        return predict

    guidance = Guidance(says(COND), says(UNCOND), guidance_scale=3.0)
    np.testing.assert_array_equal(guidance(COND, LEVEL), combine(COND, UNCOND, 3.0))


def grid_of(sampler: SamplerName, steps: int = 10, **options: object) -> Grid:
    return make_grid(sampler, SchedulerConfig.from_dict({**STABLE_DIFFUSION, **options}), steps)


def guided(grid: Grid, start: float, end: float) -> Guidance:
    interval = interval_of_steps(grid, start, end)
    says = saying(COND, []), saying(UNCOND, [])
    return Guidance(*says, guidance_scale=3.0, interval=interval)


def test_only_inside_an_interval() -> None:
    calls: list[float] = []
    guidance = Guidance(
        saying(COND, calls), saying(UNCOND, calls), guidance_scale=3.0, interval=(100.0, 500.0)
    )
    for t, times in ((99.0, 1), (100.0, 2), (500.0, 2), (501.0, 1)):
        calls.clear()
        guidance(COND, replace(LEVEL, t=t))
        assert calls == [t] * times


@pytest.mark.parametrize(
    ("scale", "rescale", "interval"),
    [
        (math.nan, 0.0, None),
        (math.inf, 0.0, None),
        (3.0, -0.1, None),
        (3.0, math.nan, None),
        (3.0, 0.0, (2.0, 1.0)),
        (3.0, 0.0, (math.nan, 1.0)),
    ],
)
def test_wrong_numbers_are_refused(
    scale: float, rescale: float, interval: tuple[float, float] | None
) -> None:
    with pytest.raises(RequestError):
        Guidance(
            saying(COND, []),
            saying(UNCOND, []),
            guidance_scale=scale,
            guidance_rescale=rescale,
            interval=interval,
        )


def test_guidance_needs_a_negative_prediction() -> None:
    with pytest.raises(RequestError, match="negative prompt"):
        Guidance(saying(COND, []), guidance_scale=7.0)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "heun"])
@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, list(range(10))),
        (0.2, 0.6, [2, 3, 4, 5]),
        (0.25, 0.35, [3]),
        (0.0, 0.1, [0]),
        (0.9, 1.0, [9]),
        (0.31, 0.39, []),
    ],
)
def test_an_interval_by_fractions_of_the_steps(
    sampler: SamplerName, start: float, end: float, expected: list[int]
) -> None:
    grid = grid_of(sampler)
    guidance = guided(grid, start, end)
    assert [i for i, level, _ in grid.walk() if guidance.guides(level)] == expected


def test_an_evaluation_between_steps_goes_with_the_nearer_one() -> None:
    # Four evaluations a step: at its ends and, twice, halfway between them.
    grid = grid_of("pndm", skip_prk_steps=False)
    guidance = guided(grid, 0.1, 0.2)  # the second of ten steps
    asked: list[Level] = []

    def denoise(x: Float32, level: Level) -> Float32:
        asked.append(level)
        half: Float32 = x * np.float32(0.5)
        return half

    list(get_sampler("pndm")(denoise, COND, grid, make_noise("torch", 0)))
    t = [level.t for level in grid.levels]
    halves = [(a + b) / 2 for a, b in itertools.pairwise(t)]
    inside = {level.t for level in asked if guidance.guides(level)}
    assert inside == {halves[0], t[1], halves[1]}
