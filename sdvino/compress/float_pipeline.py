"""The float pipeline of an exported folder, as calibration runs it: the runtime's own parts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.components import Components
from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.parts import choose_ends
from sdvino.compress.stepwise import PART_BYTES, PartedModel
from sdvino.conditioning import Conditioner
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.generation import GenerationRequest
from sdvino.graph.shapes import reshape_static
from sdvino.graph.timestep import float_timestep
from sdvino.image.tiling import tile_shape
from sdvino.model_folder import ModelFolder
from sdvino.runtime.component import Component
from sdvino.settings import DeviceSettings, RunSettings
from sdvino.unet import unet_shapes

Array = NDArray[np.float32]

_SETTINGS = RunSettings(default=DeviceSettings(precision="f32", cache=False))


class FloatPipeline:
    """The components of the folder ``path`` on the CPU in f32, one kind in memory at a time.

    Pictures have the size that ``plan`` gives their latents. Of a UNet that would take more than
    ``part_bytes`` only a part is in memory at a time; what flows between the parts is in the folder
    ``scratch`` (None: the system's) meanwhile.
    """

    def __init__(
        self,
        path: Path,
        plan: CalibrationPlan,
        *,
        scratch: Path | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        folder = ModelFolder.open(path)
        self.scheduler = SchedulerConfig.from_dict(folder.scheduler_config)
        self._folder = folder
        self._components = Components(folder, _SETTINGS)
        self._conditioner = Conditioner(self._components)
        self._size = plan.shape[1:]
        self._guidance_scale = plan.guidance_scale
        self._unet: Component | PartedModel | None = None
        self._scratch = scratch
        self._part_bytes = part_bytes

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

    def predict(self, inputs: Sequence[Mapping[str, Array]]) -> list[Array]:
        """Return the UNet's outputs for latents [1, C, h, w], timestep [1] and conditions each."""
        if self._unet is None:
            self._components.release()
            self._unet = self._make_unet(inputs[0])
        unet = self._unet
        if isinstance(unet, PartedModel):
            with tempfile.TemporaryDirectory(prefix="parts-", dir=self._scratch) as folder:
                return unet.evaluate(inputs, Path(folder))
        return [np.array(unet.infer(given)["out_sample"], np.float32) for given in inputs]

    def _make_unet(self, inputs: Mapping[str, Array]) -> Component | PartedModel:
        """Return the UNet as `Components.unet` prepares it, in parts when it is large."""
        model = ov.Core().read_model(self._folder.components["unet"].xml)  # its weights are mapped
        float_timestep(model)
        reshape_static(model, unet_shapes(self._folder, *self._size))
        ends = choose_ends(model, inputs, self._part_bytes)
        return PartedModel(model, ends) if ends else self._components.unet(*self._size)

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
