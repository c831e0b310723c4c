"""Calibration inputs: what the float pipeline itself feeds to its UNet and autoencoder.

Quantized diffusion models fail when their ranges were measured on a few timesteps or on noise
(PTQ4DM, arXiv:2211.15736; Q-Diffusion, arXiv:2302.04304). So each prompt is denoised from pure
noise with guidance, on a grid of timesteps of its own: together the grids cover every stratum of
the training timesteps, and what is kept is spread over prompts, timesteps and both branches.
Models distilled to a few steps know only the timesteps that their own sampler asks at: they are
calibrated on its grids, of several lengths.

Conditioning, guidance, denoiser and samplers are the runtime's.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.lockstep import run_together
from sdvino.compress.prompts import evenly
from sdvino.compress.recipes import CalibrationRecipe
from sdvino.diffusion.denoiser import Denoiser, Predict
from sdvino.diffusion.grid import Grid, Level, make_levels
from sdvino.diffusion.guidance import Guidance
from sdvino.diffusion.layout import DISTILLED, make_grid
from sdvino.diffusion.noise import make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.schedule import sigmas_of, train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import SdvinoError
from sdvino.settings import SamplerName

Array = NDArray[np.float32]
#: What the UNet is told beside latents and timestep, by tensor name.
Conditions = Mapping[str, Array]
#: Evaluates the UNet on its inputs by name.
Ask = Callable[[Mapping[str, Array]], Array]

# A UNet of Stable Diffusion's size takes seconds for each evaluation on a laptop, a small one
# milliseconds. Many prompts matter more than fine grids: together the grids cover every stratum.
_LARGE_UNET_BYTES = 200_000_000
_LARGE = {"trajectories": 12, "strata": 6, "unet_samples": 64}
_SMALL = {"trajectories": 48, "strata": 8, "unet_samples": 256}
#: Lengths of the grids of distilled models, by turns: what people run them with.
FEW_STEPS: tuple[int, ...] = (4, 1, 8, 2, 6, 3)
#: Samplers that ask the UNet once for each step.
_ONCE_A_STEP: tuple[SamplerName, ...] = ("euler", "euler_ancestral", "lcm", "tcd", "ddim")
#: Seeds of the noise begin here: those that people, and the gate, draw with are small.
_FIRST_SEED = 3_000_000_000


class FloatComponents(Protocol):
    """The float components that calibration runs."""

    #: The folder's scheduler_config.json.
    scheduler: SchedulerConfig

    def conditions(self, prompt: str, negative: str | None) -> tuple[Conditions, Conditions | None]:
        """Return what the UNet is told of the prompt, and of the negative one where it is asked.

        ``negative`` None is one that was not given.
        """

    def predict(self, inputs: Sequence[Mapping[str, Array]]) -> Sequence[Array]:
        """Return the UNet's output for each ``sample`` [1, C, h, w], ``timestep`` [1], conditions.

        The inputs have nothing to do with each other; many at a time may be faster.
        """

    def decode(self, latents: Array, index: int) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1].

        Of large latents that may be a part, another for each ``index``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """How many inputs are collected, and how."""

    #: Texts to denoise, one trajectory each.
    prompts: tuple[str, ...]
    #: Strata of timesteps: a trajectory takes one step in each, after one at the last timestep.
    strata: int = 8
    #: Steps of the trajectories, by turns, on the sampler's own grids; none: the strata.
    few_steps: tuple[int, ...] = ()
    #: Whose grids those are.
    sampler: SamplerName = "euler"
    #: UNet inputs kept of all.
    unet_samples: int = 256
    #: Evaluations of the UNet that count for the statistics of its activations; None: all.
    measured: int | None = None
    #: Classifier-free guidance of the trajectories; 1 or less runs no unconditional branch.
    guidance_scale: float = 7.5
    #: Whether the guidance is an input of the UNet (LCM), which then runs once a step.
    embedded_guidance: bool = False
    #: Latents: (C, h, w).
    shape: tuple[int, int, int]
    seed: int = 0

    @property
    def branches(self) -> int:
        """Return how many predictions a step takes: conditional, and unconditional if guided."""
        return 2 if self.guidance_scale > 1 and not self.embedded_guidance else 1

    @property
    def evaluations(self) -> int:
        """Return how often the UNet runs."""
        return self.branches * sum(map(self.steps, range(len(self.prompts))))

    @property
    def recorded(self) -> frozenset[int]:
        """Return which evaluations count for the statistics of activations, as they are made."""
        return self._choose(self.evaluations if self.measured is None else self.measured)

    @property
    def kept(self) -> frozenset[int]:
        """Return whose inputs are kept, counted through one trajectory after the other."""
        return self._choose(self.unet_samples)

    def _choose(self, count: int) -> frozenset[int]:
        order = np.random.default_rng(self.seed).permutation(self.evaluations)
        return frozenset(int(i) for i in order[:count])

    def steps(self, trajectory: int) -> int:
        """Return how many steps a trajectory takes."""
        if not self.few_steps:
            return self.strata + 1
        return self.few_steps[trajectory % len(self.few_steps)]


def make_plan(
    recipe: CalibrationRecipe,
    prompts: Sequence[str],
    *,
    unet_bytes: int,
    guidance_scale: float,
    shape: tuple[int, int, int],
    distilled: SamplerName | None = None,
    few_steps: tuple[int, ...] = FEW_STEPS,
    embedded_guidance: bool = False,
) -> CalibrationPlan:
    """Return the plan of ``recipe`` for a UNet with so many bytes of weights.

    ``prompts`` are the texts for a recipe that names none. Those denoised are taken evenly from
    the whole list, which may be sorted. ``shape`` is that of the latents, (C, h, w). ``distilled``
    is the sampler of a model made for ``few_steps``; a recipe that gives strata has them instead.
    """
    texts = tuple(prompts) if recipe.prompts is None else recipe.prompts
    by_size = _LARGE if unet_bytes >= _LARGE_UNET_BYTES else _SMALL
    asked = {
        "trajectories": recipe.trajectories,
        "strata": recipe.strata,
        "unet_samples": recipe.samples,
    }
    chosen = by_size | {key: value for key, value in asked.items() if value is not None}
    few = distilled is not None and recipe.strata is None
    return CalibrationPlan(
        prompts=tuple(evenly(texts, chosen.pop("trajectories"))),
        few_steps=few_steps if few else (),
        sampler=distilled if distilled in _ONCE_A_STEP else "euler",
        guidance_scale=guidance_scale,
        embedded_guidance=embedded_guidance,
        shape=shape,
        seed=recipe.seed,
        measured=recipe.samples,
        **chosen,
    )


@dataclass(frozen=True, slots=True)
class CalibrationInputs:
    """Inputs by tensor name, for each component that can be quantized."""

    unet: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    vae_decoder: list[dict[str, Array]] = field(default_factory=list)
    vae_encoder: list[dict[str, Array]] = field(default_factory=list)
    tiny_vae: list[dict[str, Array]] = field(default_factory=list)

    def of(self, component: str) -> list[dict[str, NDArray[Any]]]:
        """Return the inputs of ``component``; none for the text encoders."""
        samples: list[dict[str, NDArray[Any]]] = getattr(self, component, [])
        return samples


def timestep_grid(plan: CalibrationPlan, trajectory: int, num_train_timesteps: int) -> list[int]:
    """Return the timesteps of one trajectory, falling: the last one trained, then one a stratum.

    Trajectory i sits at the fraction (i + 1/2) / n of every stratum, so that n of them are spread
    evenly over all timesteps.
    """
    T, S = num_train_timesteps, plan.strata
    offset = (trajectory + 0.5) / len(plan.prompts)
    inner = [int(T * (S - 1 - k + offset) / S) for k in range(S)]
    return sorted({T - 1, *inner}, reverse=True)


def trajectory_grid(plan: CalibrationPlan, trajectory: int, config: SchedulerConfig) -> Grid:
    """Return the grid that one trajectory follows.

    On the strata Euler's steps are those of DDIM (arXiv:2010.02502, eta 0).
    """
    if plan.few_steps:
        steps = plan.steps(trajectory)
        if plan.sampler in DISTILLED:
            steps = min(steps, config.for_sampler(plan.sampler).original_inference_steps)
        return make_grid(plan.sampler, config, steps)
    settings = config.for_sampler("euler")
    alphas = train_alphas_cumprod(settings, keep_zero=False)
    timesteps = timestep_grid(plan, trajectory, len(alphas))
    sigmas = np.append(sigmas_of(alphas)[timesteps], np.float32(0.0)).astype(np.float64)
    return Grid(
        sampler="euler",
        levels=make_levels(np.ones_like(sigmas), sigmas, np.array(timesteps)),
        init_scale=math.sqrt(float(sigmas[0]) ** 2 + 1.0),
        config=settings,
        alpha_bars=np.insert(alphas, 0, np.float32(1.0)),
    )


def collect(
    pipeline: FloatComponents, plan: CalibrationPlan, progress: Callable[[float], None]
) -> CalibrationInputs:
    """Denoise every prompt of the plan in float and return what the components were fed.

    The same plan and pipeline give the same inputs. ``progress`` is called with the share done.
    All texts are encoded before the first UNet evaluation, and all pictures decoded after the last:
    the components need not be in memory together. The trajectories are followed side by side, so
    that a UNet of which only a part is in memory goes through its parts once for all of them.
    """
    recorder = _Recorder(pipeline, plan.kept, plan.evaluations, progress)
    # A prompt without a negative one is guided away from zeros by some models, and with an empty
    # one away from an empty text: both, by turns.
    told = [
        pipeline.conditions(prompt, "" if index % 2 else None)
        for index, prompt in enumerate(plan.prompts)
    ]
    finished = run_together(
        [partial(_denoise, recorder, plan, index, *pair) for index, pair in enumerate(told)],
        recorder.answer,
    )
    inputs = CalibrationInputs(unet=recorder.in_order())
    for index, latents in enumerate(finished):
        fed, picture = pipeline.decode(latents, index)
        if not np.isfinite(picture).all():
            raise _no_numbers()
        inputs.vae_decoder.append({"latent_sample": fed})
        inputs.vae_encoder.append({"sample": np.clip(picture, -1, 1)})
        inputs.tiny_vae.append({"latent_sample": latents})
    return inputs


@dataclass(slots=True)
class _Recorder:
    """Runs the UNet, keeps the chosen inputs and reports progress."""

    pipeline: FloatComponents
    #: Numbers of evaluations, counted through one trajectory after the other.
    chosen: frozenset[int]
    total: int
    progress: Callable[[float], None]
    done: int = 0
    kept: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict)

    def predictor(self, numbers: Iterator[int], conditions: Conditions, ask: Ask) -> Predict:
        """Return the UNet with its conditions filled in; its evaluations have these numbers."""

        def predict(x_in: Array, level: Level, /) -> Array:
            number = next(numbers)
            if number in self.chosen:
                # As the saved IR takes it.
                timestep = np.array([round(level.t)], np.int64)
                self.kept[number] = {"sample": np.array(x_in), "timestep": timestep, **conditions}
            told = np.array([level.t], np.float32)
            return ask({"sample": x_in, "timestep": told, **conditions})

        return predict

    def answer(self, inputs: list[Mapping[str, Array]]) -> Sequence[Array]:
        """Return the predictions that the trajectories wait for."""
        predictions = self.pipeline.predict(inputs)
        self.done += len(inputs)
        self.progress(self.done / self.total)
        return predictions

    def in_order(self) -> list[dict[str, NDArray[Any]]]:
        """Return the inputs that were kept, in the order of their numbers."""
        return [self.kept[number] for number in sorted(self.kept)]


def _denoise(
    recorder: _Recorder,
    plan: CalibrationPlan,
    index: int,
    conditional: Conditions,
    unconditional: Conditions | None,
    ask: Ask,
) -> Array:
    """Follow one trajectory and return its finished latents, float32 [1, C, h, w]."""
    numbers = itertools.count(plan.branches * sum(map(plan.steps, range(index))))
    grid = trajectory_grid(plan, index, recorder.pipeline.scheduler)
    noise = make_noise("torch", (_FIRST_SEED + plan.seed + index) % 2**32)
    guidance = Guidance(
        recorder.predictor(numbers, conditional, ask),
        None if unconditional is None else recorder.predictor(numbers, unconditional, ask),
        guidance_scale=1.0 if unconditional is None else plan.guidance_scale,
    )
    x = grid.initial(noise.randn((1, *plan.shape)))
    denoise = Denoiser(guidance, grid.prediction_type)
    for step in get_sampler(grid.sampler)(denoise, x, grid, noise):
        x = step.x
    try:
        return grid.final(x)
    except SdvinoError as error:
        raise _no_numbers() from error


def _no_numbers() -> SdvinoError:
    return SdvinoError(
        "The source model's pictures are not finite numbers; convert a checkpoint that generates,"
        " or use --recipe int8-weights, which needs no pictures."
    )


Sample = Mapping[str, NDArray[Any]]


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write ``samples``, arrays by tensor name, to the file ``path``."""
    arrays: dict[str, Any] = {
        f"{index}/{name}": array
        for index, sample in enumerate(samples)
        for name, array in sample.items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_samples(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Return what `save_samples` wrote, in its order; raises SdvinoError for another file."""
    samples: dict[int, dict[str, NDArray[Any]]] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                index, _, name = key.partition("/")
                samples.setdefault(int(index), {})[name] = arrays[key]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise SdvinoError(
            f"The calibration inputs in {path.name} cannot be read; convert again from the start."
        ) from error
    return [samples[index] for index in sorted(samples)]
