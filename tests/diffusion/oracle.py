"""Run diffusers' scheduler and ours side by side on a model that is a plain function."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oracle_schedulers import CLASSES, oracle_scheduler

from sdvino.diffusion.denoiser import Denoiser
from sdvino.diffusion.grid import Float32, Level
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.settings import SamplerName, SigmaScheduleName, TimestepSpacing

SHAPE = (1, 4, 8, 8)
STABLE_DIFFUSION: dict[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def model(x_in: NDArray[np.float32], t: float) -> NDArray[np.float32]:
    """Return a smooth, non-linear prediction that depends on neighbours and on the timestep."""
    x = np.asarray(x_in, np.float64)
    phase = t / 1000.0
    mixed = 0.7 * x + 0.2 * np.roll(x, 1, axis=-1) - 0.1 * np.roll(x, 1, axis=-3)
    return (np.tanh(mixed) + 0.3 * np.sin(3.0 * phase + mixed)).astype(np.float32)


def predict_at(x_in: Float32, level: Level) -> Float32:
    """Return what `model` says at a level's timestep."""
    return model(x_in, level.t)


@contextmanager
def third_party_warnings() -> Iterator[None]:
    """Let diffusers warn: of NumPy 2's ``__array__`` and of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def diffusers_config(sampler: SamplerName, **options: object) -> dict[str, Any]:
    """Return what diffusers' class of ``sampler`` would save, made with ``options``."""
    with third_party_warnings():
        scheduler = CLASSES[sampler](**options)
    return {**scheduler.config, "_class_name": CLASSES[sampler].__name__}


@dataclass
class Case:
    """One run: which sampler, on which grid, from which configuration."""

    sampler: SamplerName
    steps: int
    timestep_spacing: TimestepSpacing | None = None
    sigma_schedule: SigmaScheduleName | None = None
    eta: float = 0.0
    seed: int = 7


@lru_cache(maxsize=4)
def _made_once(
    config: str,
    sampler: SamplerName,
    timestep_spacing: TimestepSpacing | None,
    sigma_schedule: SigmaScheduleName | None,
) -> Any:
    """Return diffusers' scheduler, slow to make; ``set_timesteps`` makes it fresh again."""
    return oracle_scheduler(json.loads(config), sampler, timestep_spacing, sigma_schedule)


def run_diffusers(config: Mapping[str, object], case: Case) -> NDArray[np.float32]:
    """Return diffusers' final latents, by the loop of its Stable Diffusion pipeline."""
    with third_party_warnings():
        return _run_diffusers(config, case)


def _run_diffusers(config: Mapping[str, object], case: Case) -> NDArray[np.float32]:
    scheduler = _made_once(
        json.dumps(config), case.sampler, case.timestep_spacing, case.sigma_schedule
    )
    generator = torch.Generator("cpu").manual_seed(case.seed)
    scheduler.set_timesteps(case.steps)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": case.eta, "generator": generator}
    options = {name: value for name, value in options.items() if name in accepted}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(model(x_in.numpy(), float(t)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return np.asarray(x.numpy(), np.float32)


def run_sdvino(config: Mapping[str, object], case: Case) -> NDArray[np.float32]:
    """Return our final latents; checks that the grid counts steps and evaluations right."""
    grid = make_grid(
        case.sampler,
        SchedulerConfig.from_dict(config),
        case.steps,
        sigma_schedule=case.sigma_schedule,
        timestep_spacing=case.timestep_spacing,
    )
    noise = make_noise("torch", case.seed)
    evaluations = 0

    def predict(x_in: Float32, level: Level) -> Float32:
        nonlocal evaluations
        evaluations += 1
        assert x_in.dtype == np.float32
        return predict_at(x_in, level)

    x = grid.initial(noise.randn(SHAPE))
    denoise = Denoiser(predict, grid.prediction_type)
    steps = list(get_sampler(case.sampler)(denoise, x, grid, noise, eta=case.eta))
    assert [step.index for step in steps] == list(range(grid.steps))
    assert evaluations == grid.evaluations
    assert all(step.x.dtype == step.denoised.dtype == np.float32 for step in steps)
    return steps[-1].x


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Return the norm of the difference over the norm of diffusers' latents."""
    assert np.isfinite(theirs).all()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
