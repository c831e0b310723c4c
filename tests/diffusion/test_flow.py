"""Flow matching: diffusers' FlowMatchEulerDiscreteScheduler is the oracle, and so is arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.grid import Float32, Grid, Level, make_flow_grid, make_levels
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.settings import SamplerName
from tests.diffusion.oracle import SHAPE, relative_error, third_party_warnings

#: The data: normal about MEAN, with this deviation.
MEAN = np.linspace(-1.0, 1.0, 8).astype(np.float32)
DEVIATION = 0.4
SAMPLERS: tuple[SamplerName, ...] = ("euler", "dpmpp_2m")
NOISE = make_noise("torch", 3).randn(SHAPE)


def flow(x: Float32, sigma: float) -> Float32:
    """What a perfect model of the data says at x: the mean of eps - x0."""
    alpha = 1.0 - sigma
    seen = x.astype(np.float64) - alpha * MEAN
    variance = alpha**2 * DEVIATION**2 + sigma**2
    x0 = MEAN + alpha * DEVIATION**2 / variance * seen
    eps = sigma / variance * seen
    return (eps - x0).astype(np.float32)


def exact(x: Float32) -> Float32:
    """Where the flow takes noise ``x``, solved on paper."""
    ended: Float32 = MEAN + np.float32(DEVIATION) * x
    return ended


def predict(x_in: Float32, level: Level) -> Float32:
    assert level.t == pytest.approx(1000.0 * level.sigma, rel=1e-6)
    return flow(x_in, level.sigma)


def sampled(grid: Grid) -> Float32:
    noise = make_noise("torch", 0)
    denoise = Denoiser(predict, grid.prediction_type)
    steps = list(get_sampler(grid.sampler)(denoise, grid.initial(NOISE), grid, noise))
    assert len(steps) == grid.evaluations == grid.steps
    return grid.final(steps[-1].x)


def of_diffusers(steps: int, shift: float) -> tuple[Float32, list[float], list[float]]:
    """The latents of diffusers' scheduler, its sigmas, and its timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    with third_party_warnings():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        x = torch.from_numpy(NOISE)
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            output = torch.from_numpy(flow(x.numpy(), float(sigma)))
            x = scheduler.step(output, t, x).prev_sample
    return x.numpy(), scheduler.sigmas.tolist(), scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_euler_is_diffusers(steps: int, shift: float) -> None:
    grid = make_flow_grid("euler", steps, shift=shift)
    expected, sigmas, timesteps = of_diffusers(steps, shift)
    assert [level.sigma for level in grid.levels] == pytest.approx(sigmas, rel=1e-6)
    assert [level.t for level in grid.levels[:-1]] == pytest.approx(timesteps, rel=1e-6)
    assert all(level.alpha == 1.0 - level.sigma for level in grid.levels)
    assert relative_error(sampled(grid), expected) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_of_first_order_is_euler(shift: float) -> None:
    grid = make_flow_grid("dpmpp_2m", 12, shift=shift)
    first = replace(grid, config=replace(grid.config, solver_order=1))
    assert relative_error(sampled(first), of_diffusers(12, shift)[0]) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_diffusers(order: int, shift: float) -> None:
    """On the flow sigmas that diffusers' DPM-Solver++ lays for itself."""
    from diffusers import DPMSolverMultistepScheduler

    with third_party_warnings():
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=shift,
            solver_order=order,
        )
        scheduler.set_timesteps(10)
        x = torch.from_numpy(NOISE)
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            output = torch.from_numpy(flow(x.numpy(), float(sigma)))
            x = scheduler.step(output, t, x).prev_sample
    sigmas = scheduler.sigmas.numpy().astype(np.float64)
    grid = make_flow_grid("dpmpp_2m", 10, shift=shift)
    levels = make_levels(1.0 - sigmas, sigmas, 1000.0 * sigmas[:-1])
    config = replace(grid.config, solver_order=order)
    assert relative_error(sampled(replace(grid, levels=levels, config=config)), x.numpy()) < 1e-5


def test_euler_and_dpmpp_converge_as_their_orders_say() -> None:
    euler, dpmpp = (
        [relative_error(sampled(make_flow_grid(name, n)), exact(NOISE)) for n in (32, 64, 128)]
        for name in SAMPLERS
    )
    for errors, order in ((euler, 1), (dpmpp, 2)):
        for coarse, fine in itertools.pairwise(errors):
            assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert dpmpp[-1] < 2e-3
