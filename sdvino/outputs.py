"""What the pipeline gives back: events while it runs, pictures and timings at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvino.image.parameters import PictureSettings
from sdvino.request import PictureJob

OutputType = Literal["pil", "np", "latent"]
Array = NDArray[np.float32]


@dataclass(slots=True)
class Timings:
    """Seconds spent, by part, summed over the pictures of a call."""

    load: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    #: Evaluations of the UNet, each a conditional or an unconditional one.
    unet_evaluations: int = 0

    @property
    def total(self) -> float:
        """Return the seconds of all parts."""
        return self.load + self.text + self.denoise + self.decode


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A step of the denoising loop has ended."""

    job: PictureJob
    #: Index of the step, from 0, and how many there are.
    step: int
    steps: int
    timestep: float
    #: What the sampler goes on from, in the sampler's own scale: float32 [1, C, h, w].
    latents: Array
    #: The model's present guess at the finished latents: float32 [1, C, h, w].
    denoised: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureEvent:
    """A picture is finished."""

    job: PictureJob
    #: Finished latents in diffusers' scale: float32 [1, C, h, w].
    latents: Array
    #: uint8 or float32 (0 to 1) [H, W, 3]; None where only latents were asked for.
    pixels: NDArray[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Text states given instead of a prompt, float32; None is left to the text encoders."""

    #: [N, length, width] each.
    prompt: Array | None = None
    negative: Array | None = None
    #: [N, width] each.
    pooled: Array | None = None
    negative_pooled: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOutput:
    """What a call returns; ``images`` and the rest are in the order of the prompts."""

    #: A list of PIL pictures, or a float32 array [N, H, W, 3] (0 to 1), or latents [N, C, h, w].
    images: Any
    seeds: list[int]
    #: How each picture was made; `sdvino.image.picture.save_picture` writes it into the file.
    settings: list[PictureSettings]
    timings: Timings
    #: The words of each prompt that did not fit into the text encoder; '' where all did.
    dropped: list[str]


def gather(pictures: Sequence[PictureEvent], output_type: OutputType) -> Any:
    """Return finished pictures in the form that ``output_type`` names."""
    if output_type == "latent":
        return np.concatenate([picture.latents for picture in pictures])
    arrays = [picture.pixels for picture in pictures if picture.pixels is not None]
    if output_type == "np":
        return np.stack(arrays)
    from PIL import Image

    return [Image.fromarray(array) for array in arrays]


@contextmanager
def clock(timings: Timings, part: str) -> Iterator[None]:
    """Add the seconds of a block to one part of ``timings``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(timings, part, getattr(timings, part) + time.perf_counter() - started)
