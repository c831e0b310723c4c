"""What is asked of the pipeline: one validated request, and one job for each of its pictures."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.settings import (
    MAX_SEED,
    MIN_SEED,
    NOISES,
    NoiseName,
    SamplerName,
    SamplerSettings,
    SpeedSettings,
    check_choice,
)

#: Longer prompts are refused: 77 tokens are read, and no sentence is this long.
MAX_PROMPT_CHARACTERS = 20_000
MAX_PICTURES = 10_000
#: Pictures of all prompts together.
MAX_TOTAL = 100_000
MAX_SIDE = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to generate. None leaves a value to what the model folder suggests."""

    #: One text for each series of pictures.
    prompts: tuple[str, ...]
    #: What the pictures should not show: one text for all prompts, or one for each; None says
    #: nothing, for which Stable Diffusion XL has zeros rather than the states of an empty text.
    negative_prompts: tuple[str | None, ...] = (None,)
    #: Pixels, multiples of the autoencoder's factor (8).
    height: int | None = None
    width: int | None = None
    #: Denoising steps; PNDM and Heun take more evaluations than steps, as in diffusers.
    num_inference_steps: int | None = None
    #: Classifier-free guidance (arXiv:2207.12598); 1 or less runs the conditional prediction alone.
    guidance_scale: float | None = None
    #: Share of the rescaling of arXiv:2305.08891, section 3.4; 0 is off.
    guidance_rescale: float = 0.0
    #: Layers of the text encoder left out at its end; None: none.
    clip_skip: int | None = None
    #: Seed of the first picture, the next has seed + 1; None draws one.
    seed: int | None = None
    #: Pictures of each prompt.
    num_images_per_prompt: int = 1
    #: Whose random numbers: torch's CPU generator, or CUDA's.
    noise: NoiseName = "torch"
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    #: What makes pictures sooner at a price; nothing unless asked for.
    speed: SpeedSettings = field(default_factory=SpeedSettings)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise RequestError("There is no prompt; say in a few words what to draw.")
        if len(self.negative_prompts) not in (1, len(self.prompts)):
            raise RequestError(
                f"There are {len(self.negative_prompts)} negative prompts for"
                f" {len(self.prompts)} prompts; give one, or one for each."
            )
        for text in (*self.prompts, *self.negative_prompts):
            if text is not None:
                _check_prompt(text)
        for name in ("height", "width"):
            _check_range(name, getattr(self, name), 8, MAX_SIDE)
        _check_range("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_range("clip_skip", self.clip_skip, 0, 100)
        _check_range("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_PICTURES)
        if len(self.prompts) * self.num_images_per_prompt > MAX_TOTAL:
            raise RequestError(
                f"{len(self.prompts):,} prompts of {self.num_images_per_prompt:,} pictures each are"
                f" more than the {MAX_TOTAL:,} of one request; make it several."
            )
        _check_range("seed", self.seed, MIN_SEED, MAX_SEED)
        _check_number("guidance_scale", self.guidance_scale, 0.0, 1000.0)
        _check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        check_choice("noise", self.noise, NOISES)

    def resolve(self, folder: ModelFolder) -> ResolvedRequest:
        """Fill what was left open from the model folder, and check sizes against it."""
        suggested, kind = folder.suggested, folder.kind
        factor = folder.vae_scale_factor
        height = folder.height if self.height is None else self.height
        width = folder.width if self.width is None else self.width
        for name, value in (("height", height), ("width", width)):
            if value % factor:
                below = max(factor, value // factor * factor)
                raise RequestError(
                    f"The {name} is {value}, which is not a multiple of {factor};"
                    f" use {below} or {below + factor}."
                )
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        count = len(self.prompts) * self.num_images_per_prompt
        if seed + count - 1 > MAX_SEED:
            raise RequestError(f"The seed {seed} leaves no room for {count} pictures; lower it.")
        negatives = self.negative_prompts
        if len(negatives) == 1:
            negatives = negatives * len(self.prompts)
        texts = [
            (i, prompt, negative)
            for i, (prompt, negative) in enumerate(zip(self.prompts, negatives, strict=True))
            for _ in range(self.num_images_per_prompt)
        ]
        return ResolvedRequest(
            height=height,
            width=width,
            num_inference_steps=_first(
                self.num_inference_steps, suggested.num_inference_steps, kind.num_inference_steps
            ),
            guidance_scale=float(
                _first(self.guidance_scale, suggested.guidance_scale, kind.guidance_scale)
            ),
            guidance_rescale=self.guidance_rescale,
            clip_skip=None if self.clip_skip == 0 else self.clip_skip,
            noise=self.noise,
            scheduler=_first(self.sampler.scheduler, suggested.scheduler, None),
            sampler=self.sampler,
            speed=_speed(self.speed, folder),
            jobs=tuple(
                PictureJob(
                    index=i,
                    prompt_index=prompt_index,
                    prompt=prompt,
                    negative_prompt=negative,
                    seed=seed + i,
                )
                for i, (prompt_index, prompt, negative) in enumerate(texts)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureJob:
    """One picture of a request."""

    #: Among all pictures, and which of the prompts it is made from.
    index: int
    prompt_index: int
    prompt: str
    #: None: not given.
    negative_prompt: str | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left open; see `GenerationRequest` for the fields."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    clip_skip: int | None
    noise: NoiseName
    #: None: the sampler of the folder's own scheduler_config.json.
    scheduler: SamplerName | None
    sampler: SamplerSettings
    #: Its ``tiny_vae`` is no longer None.
    speed: SpeedSettings
    jobs: tuple[PictureJob, ...]


def as_texts(what: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return a prompt argument of diffusers' call (a text or a list of texts) as a tuple."""
    if value is None:
        return ("",)
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"The {what} is a {type(text).__name__}; give text.")
    return texts


def _speed(speed: SpeedSettings, folder: ModelFolder) -> SpeedSettings:
    """Decide on the tiny decoder; raises RequestError where it is asked for and not there."""
    there = "tiny_vae" in folder.components
    if speed.tiny_vae and not there:
        raise RequestError(
            f"The model folder {folder.name} has no tiny decoder; leave --tiny-vae out, or convert"
            " the model with one."
        )
    return replace(speed, tiny_vae=there if speed.tiny_vae is None else speed.tiny_vae)


def _first(*values: object) -> Any:
    return next((value for value in values if value is not None), None)


def as_negative_texts(value: str | Sequence[str] | None) -> tuple[str | None, ...]:
    """Return the negative prompt argument as a tuple; None stays None."""
    return (None,) if value is None else as_texts("negative prompt", value)


def _check_prompt(text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"A prompt has {len(text):,} characters; shorten it to {MAX_PROMPT_CHARACTERS:,} or"
            " fewer (the model reads about 75 words)."
        )


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}; give a whole number.")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; give a whole number from {low} to {high}.")


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; give a number from {low:g} to {high:g}.")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value:g}; give a number from {low:g} to {high:g}.")
