"""The process in torch is the runtime's, step for step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.train.distillation.noise_levels import NoiseLevels, draw_timesteps
from sdvino.train.distillation.settings import few_step_scheduler
from tests.train.distillation.students import SCHEDULER

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def process(prediction: str, **changes: Any) -> NoiseLevels:
    return NoiseLevels({**SCHEDULER, "prediction_type": prediction, **changes})


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_jumps_over_the_grid_are_the_runtimes_own_sampling(prediction: str, steps: int) -> None:
    """What a student is trained to do is what sdvino does with its folder's scheduler."""
    config = few_step_scheduler({**SCHEDULER, "prediction_type": prediction})
    runtime = make_grid("ddim", SchedulerConfig.from_dict(config), steps)
    levels = NoiseLevels(config)
    grid = levels.grid(steps)
    assert grid[:-1] == [level.t for level in runtime.levels[:-1]]
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((4, 4), dtype=np.float32) / 2

    def model(x: Any, t: float) -> Any:
        return np.einsum("ij,njhw->nihw", mix, np.asarray(x)) * np.float32(np.cos(t))

    begin = rng.standard_normal((2, 4, 3, 3), dtype=np.float32)
    denoiser = Denoiser(lambda x, level: model(x, level.t), levels.prediction_type)
    noise = make_noise("torch", 0)
    *_, last = get_sampler("ddim")(denoiser, begin, runtime, noise)
    x = torch.from_numpy(begin)
    for t, to in pairwise(grid):
        at = torch.full((2,), t)
        x = levels.jump(torch.from_numpy(model(x, t)), x, at, torch.full((2,), to))
    np.testing.assert_allclose(x.numpy(), last.x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_is_split_into_the_picture_and_the_noise(prediction: str) -> None:
    levels = process(prediction)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 400, 0])
    x = levels.noised(x0, noise, t)
    a, s = levels.split(t)
    said = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction]
    seen, eps = levels.x0_and_eps(said, x, t)
    torch.testing.assert_close(seen, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(eps, noise, rtol=1e-3, atol=1e-3)
    to = torch.tensor([749, 100, -1])
    onward = levels.noised(x0, noise, to)
    torch.testing.assert_close(levels.jump(said, x, t, to), onward, rtol=1e-3, atol=1e-3)
    back = levels.x0_for_jump(x, t, onward, to)
    torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)


def test_at_the_end_of_the_grid_is_the_picture() -> None:
    levels = process("v_prediction", rescale_betas_zero_snr=True)
    assert levels.grid(4) == [999, 749, 499, 249, -1]
    a, s = levels.split(torch.tensor([-1, 999]))
    assert a.flatten().tolist() == [1.0, 0.0]
    assert s.flatten().tolist() == [0.0, 1.0]


def test_steps_that_do_not_divide_and_noise_that_hides_all_are_refused() -> None:
    with pytest.raises(RequestError, match="3 steps do not divide the model's 1000 timesteps"):
        process("epsilon").grid(3)
    with pytest.raises(RequestError, match="rescale_betas_zero_snr"):
        process("epsilon", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_timesteps_are_drawn_as_often_as_their_weights_say(prediction: str) -> None:
    weights = process(prediction).weights()
    assert weights.sum() == pytest.approx(1.0)
    assert weights.min() >= 0.5 / 1000
    drawn = draw_timesteps(weights, 20_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=1000) / len(drawn)
    assert np.abs(counts.cumsum() - weights.cumsum()).max() < 1e-3
    few = draw_timesteps(weights, 4, np.random.default_rng(0))
    assert np.all(np.diff(few) > 0)  # one from each quarter
