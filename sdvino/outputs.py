"""What the pipeline gives back: events while it runs, pictures and timings at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvino.request import PictureJob, PictureRecord
from sdvino.runtime.timings import Timings

OutputType = Literal["pil", "np", "latent"]
Array = NDArray[np.float32]


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
class PipelineOutput:
    """What a call returns; ``images`` and the rest are in the order of the prompts."""

    #: A list of PIL pictures, or a float32 array [N, H, W, 3] (0 to 1), or latents [N, C, h, w].
    images: Any
    seeds: list[int]
    #: How each picture was made; `sdvino.image.picture.save_picture` writes it into the file.
    records: list[PictureRecord]
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
