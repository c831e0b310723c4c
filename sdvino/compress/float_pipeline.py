"""The float pipeline of an exported folder, as calibration runs it: the runtime's own parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdvino.components import Components
from sdvino.compress.calibration import CalibrationPlan
from sdvino.conditioning import Conditioner
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.generation import GenerationRequest
from sdvino.image.tiling import tile_shape
from sdvino.model_folder import ModelFolder
from sdvino.runtime.component import Component
from sdvino.settings import DeviceSettings, RunSettings

Array = NDArray[np.float32]

_SETTINGS = RunSettings(default=DeviceSettings(precision="f32", cache=False))


class FloatPipeline:
    """The components of the folder ``path`` on the CPU in f32, one kind in memory at a time.

    Pictures have the size that ``plan`` gives their latents.
    """

    def __init__(self, path: Path, plan: CalibrationPlan) -> None:
        folder = ModelFolder.open(path)
        self.scheduler = SchedulerConfig.from_dict(folder.scheduler_config)
        self._folder = folder
        self._components = Components(folder, _SETTINGS)
        self._conditioner = Conditioner(self._components)
        self._size = plan.shape[1:]
        self._guidance_scale = plan.guidance_scale
        self._unet: Component | None = None

    def conditions(
        self, prompt: str, negative: str | None
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """Return the UNet's inputs but for latents and timestep; see `Conditioner.unet_inputs`."""
        height, width = (side * self._folder.vae_scale_factor for side in self._size)
        request = GenerationRequest(
            prompts=(prompt,),
            negative_prompts=(negative,),
            height=height,
            width=width,
            guidance_scale=self._guidance_scale,
            seed=0,
        ).resolve(self._folder)
        return self._conditioner.unet_inputs(request, request.jobs[0])

    def predict(self, inputs: Mapping[str, Array]) -> Array:
        """Return the UNet's output for latents [1, C, h, w], a timestep [1] and conditions."""
        if self._unet is None:
            self._components.release()
            self._unet = self._components.unet(*self._size)
        return np.array(self._unet.infer(inputs)["out_sample"], np.float32)

    def decode(self, latents: Array, index: int) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1].

        Of latents larger than a tile it is a tile, where the runtime may decode in tiles too: the
        decoder's statistics take memory by the picture's area.
        """
        if self._unet is not None:
            self._components.release()
            self._unet = None
        part = part_of(latents, index)
        component = self._components.vae_decoder(*part.shape[2:], pixels=False)
        pixels = np.array(component.infer({"latent_sample": part})["pixels"], np.float32)
        picture = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) * np.float32(2) - np.float32(1)
        shift = self._folder.shift_factor
        fed = part / np.float32(self._folder.scaling_factor)
        return fed if shift is None else fed + np.float32(shift), picture


def part_of(latents: Array, index: int) -> Array:
    """Return a tile of ``latents`` float32 [1, C, h, w]: by turns its corners and its middle."""
    height, width = latents.shape[2:]
    high, wide = tile_shape(height, width)
    down, across = ((0, 0), (2, 2), (0, 2), (2, 0), (1, 1))[index % 5]
    y, x = (height - high) * down // 2, (width - wide) * across // 2
    return np.ascontiguousarray(latents[:, :, y : y + high, x : x + wide])
