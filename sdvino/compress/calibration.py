"""Calibration inputs: what the float pipeline itself feeds to its UNet and autoencoder.

Quantized diffusion models fail when their ranges were measured on a few timesteps or on noise
(PTQ4DM, arXiv:2211.15736; Q-Diffusion, arXiv:2302.04304). So each prompt is denoised from pure
noise with guidance, on a grid of timesteps of its own: together the grids cover every stratum of
the training timesteps, and what is kept is spread over prompts, timesteps and both branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.recipes import CalibrationRecipe
from sdvino.compress.samples import load_samples, save_samples
from sdvino.diffusion.guidance import combine
from sdvino.errors import SdvinoError

Array = NDArray[np.float32]
#: What the UNet is told beside latents and timestep, by tensor name.
Conditions = Mapping[str, Array]

# A UNet of Stable Diffusion's size takes seconds for each evaluation on a laptop, a small one
# milliseconds. Many prompts matter more than fine grids: together the grids cover every stratum.
_LARGE_UNET_BYTES = 200_000_000
_LARGE = {"trajectories": 12, "strata": 6, "unet_samples": 64}
_SMALL = {"trajectories": 48, "strata": 8, "unet_samples": 256}


class FloatPipeline(Protocol):
    """The float components that calibration runs."""

    #: Cumulated products of 1 - beta for each training timestep, float [T].
    alphas_cumprod: NDArray[np.floating[Any]]
    #: epsilon, v_prediction or sample.
    prediction_type: str

    def encode(self, prompt: str) -> Conditions:
        """Return what the UNet is told of ``prompt``: ``encoder_hidden_states`` [1, 77, D] ..."""

    def predict(self, sample: Array, timestep: int, conditions: Conditions) -> Array:
        """Return the UNet's output for latents [1, C, h, w] at an integer timestep."""

    def decode(self, latents: Array) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """How many inputs are collected, and how."""

    #: Texts to denoise, one trajectory each.
    prompts: tuple[str, ...]
    #: Strata of timesteps: a trajectory takes one step in each, after one at the last timestep.
    strata: int = 8
    #: UNet inputs kept of the 2 x (strata + 1) of each trajectory.
    unet_samples: int = 256
    #: Classifier-free guidance of the trajectories; 1 or less runs no unconditional branch.
    guidance_scale: float = 7.5
    #: Latents: (C, h, w).
    shape: tuple[int, int, int]
    seed: int = 0

    @property
    def branches(self) -> int:
        """Return how many predictions a step takes: conditional, and unconditional if guided."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def evaluations(self) -> int:
        """Return how often the UNet runs."""
        return len(self.prompts) * (self.strata + 1) * self.branches


def make_plan(
    recipe: CalibrationRecipe,
    prompts: Sequence[str],
    *,
    unet_bytes: int,
    guidance_scale: float,
    shape: tuple[int, int, int],
) -> CalibrationPlan:
    """Return the plan of ``recipe`` for a UNet with so many bytes of weights.

    ``prompts`` are the texts for a recipe that names none. Those denoised are taken evenly from
    the whole list, which may be sorted. ``shape`` is that of the latents, (C, h, w).
    """
    texts = tuple(prompts) if recipe.prompts is None else recipe.prompts
    by_size = _LARGE if unet_bytes >= _LARGE_UNET_BYTES else _SMALL
    asked = {
        "trajectories": recipe.trajectories,
        "strata": recipe.strata,
        "unet_samples": recipe.samples,
    }
    chosen = by_size | {key: value for key, value in asked.items() if value is not None}
    count = min(chosen.pop("trajectories"), len(texts))
    return CalibrationPlan(
        prompts=tuple(texts[i * len(texts) // count] for i in range(count)),
        guidance_scale=guidance_scale,
        shape=shape,
        seed=recipe.seed,
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

    def save(self, folder: Path) -> None:
        """Write each component's inputs to ``folder``, as COMPONENT.npz: arrays, nothing else."""
        folder.mkdir(parents=True, exist_ok=True)
        for component in self.__dataclass_fields__:
            save_samples(folder / f"{component}.npz", self.of(component))

    @classmethod
    def load(cls, folder: Path) -> CalibrationInputs:
        """Read what `save` wrote; raises SdvinoError for anything else."""
        return cls(
            **{name: load_samples(folder / f"{name}.npz") for name in cls.__dataclass_fields__}
        )


def timestep_grid(plan: CalibrationPlan, trajectory: int, num_train_timesteps: int) -> list[int]:
    """Return the timesteps of one trajectory, falling: the last one trained, then one a stratum.

    Trajectory i sits at the fraction (i + 1/2) / n of every stratum, so that n of them are spread
    evenly over all timesteps.
    """
    T, S = num_train_timesteps, plan.strata
    offset = (trajectory + 0.5) / len(plan.prompts)
    inner = [int(T * (S - 1 - k + offset) / S) for k in range(S)]
    return sorted({T - 1, *inner}, reverse=True)


def split_prediction(
    prediction_type: str, prediction: Array, x: Array, alpha: np.float32, sigma: np.float32
) -> tuple[Array, Array]:
    """Return (x_0, epsilon) from the UNet's output, where x = alpha x_0 + sigma epsilon.

    Source: arXiv:2202.00512, section 4 and appendix D.
    """
    if prediction_type == "v_prediction":
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x
    if prediction_type == "sample":
        return prediction, (x - alpha * prediction) / sigma
    if prediction_type == "epsilon":
        return (x - sigma * prediction) / max(alpha, np.float32(1e-4)), prediction
    raise SdvinoError(f"Calibration does not know the prediction type {prediction_type!r}.")


def collect(
    pipeline: FloatPipeline, plan: CalibrationPlan, progress: Callable[[float], None]
) -> CalibrationInputs:
    """Denoise every prompt of the plan in float and return what the components were fed.

    The same plan and pipeline give the same inputs. ``progress`` is called with the share done.
    """
    rng = np.random.default_rng(plan.seed)
    chosen = rng.permutation(plan.evaluations)[: plan.unet_samples]
    recorder = _Recorder(pipeline, frozenset(int(i) for i in chosen), plan.evaluations, progress)
    unconditional = pipeline.encode("") if plan.branches == 2 else None
    inputs = CalibrationInputs(unet=recorder.kept)
    for index, prompt in enumerate(plan.prompts):
        noise = rng.standard_normal((1, *plan.shape), dtype=np.float32)
        timesteps = timestep_grid(plan, index, len(pipeline.alphas_cumprod))
        latents = _denoise(recorder, plan, timesteps, noise, pipeline.encode(prompt), unconditional)
        if not np.isfinite(latents).all():
            raise SdvinoError(
                "The source model's pictures are not finite numbers; convert a checkpoint that"
                " generates, or use --recipe int8-weights, which needs no pictures."
            )
        fed, picture = pipeline.decode(latents)
        inputs.vae_decoder.append({"latent_sample": fed})
        inputs.vae_encoder.append({"sample": np.clip(picture, -1, 1)})
        inputs.tiny_vae.append({"latent_sample": latents})
    return inputs


@dataclass(slots=True)
class _Recorder:
    """Runs the UNet, keeps the chosen inputs and reports progress."""

    pipeline: FloatPipeline
    chosen: frozenset[int]
    total: int
    progress: Callable[[float], None]
    done: int = 0
    kept: list[dict[str, NDArray[Any]]] = field(default_factory=list)

    def predict(self, x: Array, timestep: int, conditions: Conditions) -> Array:
        if self.done in self.chosen:
            self.kept.append(
                {
                    "sample": x,
                    "timestep": np.array([timestep], dtype=np.int64),
                    **conditions,
                }
            )
        self.done += 1
        prediction = self.pipeline.predict(x, timestep, conditions)
        self.progress(self.done / self.total)
        return prediction


def _denoise(
    recorder: _Recorder,
    plan: CalibrationPlan,
    timesteps: Sequence[int],
    noise: Array,
    conditional: Conditions,
    unconditional: Conditions | None,
) -> Array:
    """Follow DDIM (arXiv:2010.02502, eta 0) along ``timesteps`` and return the last x_0."""
    pipeline = recorder.pipeline
    x = x_0 = noise
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        prediction = recorder.predict(x, t, conditional)
        if unconditional is not None:
            base = recorder.predict(x, t, unconditional)
            prediction = combine(prediction, base, plan.guidance_scale)
        alpha, sigma = _alpha_sigma(pipeline, t)
        x_0, epsilon = split_prediction(pipeline.prediction_type, prediction, x, alpha, sigma)
        if t_next is not None:
            alpha, sigma = _alpha_sigma(pipeline, t_next)
            x = alpha * x_0 + sigma * epsilon
    return x_0


def _alpha_sigma(pipeline: FloatPipeline, timestep: int) -> tuple[np.float32, np.float32]:
    product = float(pipeline.alphas_cumprod[timestep])
    return np.float32(product**0.5), np.float32((1 - product) ** 0.5)
