"""What is asked of the pipeline: one request for the call, the command line, a picture, a server.

An option is one field here, or in `SamplerSettings` or `SpeedSettings` of `sdvino.settings`: its
check, its spellings on the command line and its key in a picture's text stand beside it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sdvino import __version__
from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.inputs.fields import Choice, Number, Option, Whole, option, options_of, take_fields
from sdvino.settings import MAX_SEED, MIN_SEED, NOISES, NoiseName, SamplerSettings, SpeedSettings

#: Longer prompts are refused: 77 tokens are read, and no sentence is this long.
MAX_PROMPT_CHARACTERS = 20_000
MAX_PICTURES = 10_000
#: Pictures of all prompts together.
MAX_TOTAL = 100_000
MAX_SIDE = 16_384
#: A1111's names for whose random numbers are used.
_NOISE_TITLES = {"torch": "CPU", "cuda": "GPU"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to generate. None leaves a value to what the model folder suggests."""

    #: One text for each series of pictures.
    prompts: tuple[str, ...]
    #: What the pictures should not show: one text for all prompts, or one for each; None says
    #: nothing, for which Stable Diffusion XL has zeros rather than the states of an empty text.
    negative_prompts: tuple[str | None, ...] = (None,)
    #: Pictures of each prompt.
    num_images_per_prompt: int = option(
        Whole(1, MAX_PICTURES), "Pictures of each prompt.  [default: 1]", "-n", default=1
    )
    #: Denoising steps; PNDM and Heun take more evaluations than steps, as in diffusers.
    num_inference_steps: int | None = option(
        Whole(1, 1000), "Denoising steps.  [default: the model's]", "--steps", a1111="Steps"
    )
    #: Classifier-free guidance (arXiv:2207.12598); 1 or less runs the conditional prediction alone.
    guidance_scale: float | None = option(
        Number(0.0, 1000.0),
        "How closely to follow the prompt; 1 is twice as fast.  [default: the model's]",
        "--guidance-scale",
        "--cfg-scale",
        a1111="CFG scale",
    )
    #: Share of the rescaling of arXiv:2305.08891, section 3.4; 0 is off.
    guidance_rescale: float = option(
        Number(0.0, 1.0),
        "Against overexposure, 0 to 1.  [default: 0]",
        key="Guidance rescale",
        default=0.0,
    )
    #: Seed of the first picture, the next has seed + 1; None draws one.
    seed: int | None = option(
        Whole(MIN_SEED, MAX_SEED),
        "The same seed gives the same picture.  [default: a new one]",
        "-s",
        "--seed",
        a1111="Seed",
    )
    #: Pixels, multiples of the autoencoder's factor (8).
    width: int | None = option(
        Whole(8, MAX_SIDE), "Pixels, a multiple of 8.  [default: the model's]", "-W", "--width"
    )
    height: int | None = option(
        Whole(8, MAX_SIDE), "Pixels, a multiple of 8.  [default: the model's]", "-H", "--height"
    )
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    #: Layers of the text encoder left out at its end; None: none. A1111's number is one more.
    clip_skip: int | None = option(
        Whole(0, 100, shift=1), "Leave out the last layers of the text encoder.", a1111="Clip skip"
    )
    #: Whose random numbers: torch's CPU generator, or CUDA's, which are A1111's own.
    noise: NoiseName = option(
        Choice(NOISES, _NOISE_TITLES, {"nv": "cuda"}),
        "Random numbers as torch makes them on the CPU, or CUDA's.  [default: torch]",
        a1111="RNG",
        always=True,
        default="torch",
    )
    #: What makes pictures sooner at a price; nothing unless asked for.
    speed: SpeedSettings = field(default_factory=SpeedSettings)

    def __post_init__(self) -> None:
        take_fields(self)
        for name, none in (("prompts", False), ("negative_prompts", True)):
            texts = _texts(name, getattr(self, name), none=none)
            object.__setattr__(self, name, texts)
        if not self.prompts:
            raise RequestError("There is no prompt; say in a few words what to draw.")
        if len(self.negative_prompts) not in (1, len(self.prompts)):
            raise RequestError(
                f"There are {len(self.negative_prompts)} negative prompts for"
                f" {len(self.prompts)} prompts; give one, or one for each."
            )
        if len(self.prompts) * self.num_images_per_prompt > MAX_TOTAL:
            raise RequestError(
                f"{len(self.prompts):,} prompts of {self.num_images_per_prompt:,} pictures each are"
                f" more than the {MAX_TOTAL:,} of one request; make it several."
            )

    @staticmethod
    def of(**values: Any) -> Request:
        """Return the request with these fields, those of its sampler and speed among them.

        Raises RequestError for a wrong value, TypeError for a name that is none.
        """
        parts = {
            part: kind(**{name: values.pop(name) for name in options_of(kind) if name in values})
            for part, kind in _PARTS.items()
        }
        return Request(**parts, **values)

    def flat(self) -> dict[str, Any]:
        """Return the fields that `of` takes."""
        values = {one.name: getattr(self, one.name) for one in fields(Request)}
        parts = [values.pop(part) for part in _PARTS]
        return values | {name: getattr(part, name) for part in parts for name in options_of(part)}

    def to_plain(self) -> dict[str, Any]:
        """Return what is not as it is by default, as JSON takes it; `from_plain` reads it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.flat().items()
            if name not in DEFAULTS or value != DEFAULTS[name]
        }

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> Request:
        """Return the request of such values; raises RequestError for a wrong name or value."""
        for name in values:
            if name not in DEFAULTS and name != "prompts":
                known = ", ".join(["prompts", *DEFAULTS])
                raise RequestError(f"A request has no {str(name)[:80]!r}; it has {known}.")
        return Request.of(**{"prompts": (), **values})

    def resolve(self, folder: ModelFolder) -> ResolvedRequest:
        """Fill what was left open from the model folder, and check sizes against it."""
        suggested, kind = folder.suggested, folder.kind
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        given = {one.name: getattr(self, one.name) for one in fields(Request)}
        filled = {
            "width": _side("width", self.width, folder.width, folder.vae_scale_factor),
            "height": _side("height", self.height, folder.height, folder.vae_scale_factor),
            "num_inference_steps": _first(
                self.num_inference_steps, suggested.num_inference_steps, kind.num_inference_steps
            ),
            "guidance_scale": float(
                _first(self.guidance_scale, suggested.guidance_scale, kind.guidance_scale)
            ),
            "clip_skip": None if self.clip_skip == 0 else self.clip_skip,
            "sampler": replace(
                self.sampler, scheduler=_first(self.sampler.scheduler, suggested.scheduler)
            ),
            "speed": _speed(self.speed, folder),
            "seed": seed,
        }
        return ResolvedRequest(**{**given, **filled}, jobs=tuple(self._jobs(seed)))

    def _jobs(self, seed: int) -> Sequence[PictureJob]:
        count = len(self.prompts) * self.num_images_per_prompt
        if seed + count - 1 > MAX_SEED:
            raise RequestError(f"The seed {seed} leaves no room for {count} pictures; lower it.")
        negatives, each = self.negative_prompts, self.num_images_per_prompt
        return [
            PictureJob(
                index=i,
                prompt_index=i // each,
                prompt=self.prompts[i // each],
                negative_prompt=negatives[0 if len(negatives) == 1 else i // each],
                seed=seed + i,
            )
            for i in range(count)
        ]


_PARTS: Mapping[str, Any] = {"sampler": SamplerSettings, "speed": SpeedSettings}
#: The options of a request, with those of its sampler and speed, by the fields' names.
OPTIONS: Mapping[str, Option] = {
    name: found
    for one in fields(Request)
    for name, found in options_of(_PARTS.get(one.name, Request)).items()
    if one.name in (name, *_PARTS)
}


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
class ResolvedRequest(Request):
    """A request with nothing left open, but for what the folder's scheduler says.

    Its ``speed.tiny_vae`` is no longer None.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    jobs: tuple[PictureJob, ...]

    def of_picture(self, job: PictureJob, **values: Any) -> Request:
        """Return the request that repeats the picture of ``job``, with other ``values`` put in."""
        alone = {
            "prompts": (job.prompt,),
            "negative_prompts": (job.negative_prompt,),
            "num_images_per_prompt": 1,
            "seed": job.seed,
        }
        return Request.of(**{**self.flat(), **alone, **values})


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRecord:
    """How a picture was made; its file carries this. None is what its maker did not say."""

    #: Of one prompt and one picture.
    request: Request
    #: Name of the model, never where it lies: folders before it are cut off.
    model: str | None = None
    #: How the model was compressed.
    recipe: str | None = None
    #: Program and version that made the picture.
    version: str | None = f"sdvino {__version__}"
    #: What else stands in the text, in its order: other programs' keys.
    other: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.model is not None:
            name = re.split(r"[/\\]", self.model.rstrip("/\\"))[-1]
            object.__setattr__(self, "model", name)

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.request.prompts[0]

    def to_plain(self) -> dict[str, Any]:
        """Return the request as `Request.to_plain` does, and the rest beside it."""
        about = {"model": self.model, "recipe": self.recipe, "version": self.version}
        return {**self.request.to_plain(), **about, "other": [list(pair) for pair in self.other]}


def as_texts(value: str | Sequence[str | None] | None) -> tuple[str | None, ...]:
    """Return a prompt argument of diffusers' call (a text or a list of texts) as a tuple."""
    return (value,) if value is None or isinstance(value, str) else tuple(value)


def _texts(name: str, texts: Any, *, none: bool) -> tuple[str | None, ...]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise RequestError(f"The {name} are a {type(texts).__name__}; give a list of texts.")
    for text in texts:
        if text is None and none:
            continue
        if not isinstance(text, str):
            what = name.removesuffix("s").replace("_", " ")
            raise RequestError(f"The {what} is a {type(text).__name__}; give text.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(
                f"A prompt has {len(text):,} characters; shorten it to {MAX_PROMPT_CHARACTERS:,} or"
                " fewer (the model reads about 75 words)."
            )
    return tuple(texts)


def _side(name: str, value: int | None, default: int, factor: int) -> int:
    """Return a side of the picture; raises RequestError for no multiple of ``factor``."""
    side = default if value is None else value
    if side % factor:
        below = max(factor, side // factor * factor)
        raise RequestError(
            f"The {name} is {side}, which is not a multiple of {factor};"
            f" use {below} or {below + factor}."
        )
    return side


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


#: What each field is where nothing is said; the prompts must be.
DEFAULTS: Mapping[str, Any] = {
    name: value for name, value in Request.of(prompts=("",)).flat().items() if name != "prompts"
}
