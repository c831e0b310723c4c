"""The float pipeline of an exported folder, as calibration runs it.

Its text encoders are the runtime's own parts. UNet and autoencoder are the graphs that are to be
quantized, and tell what their activations are like while they draw.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan
from sdvino.compress.parts import choose_ends
from sdvino.compress.statistics import Recorder, fix_shapes
from sdvino.compress.stepwise import PART_BYTES, Evaluator
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.folder.index import ModelFolder
from sdvino.graph.timestep import float_timestep
from sdvino.graph.upsampling import split_upsampling
from sdvino.image.tiling import tile_shape
from sdvino.request import Request
from sdvino.runtime.components import Components
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.properties import compile_properties
from sdvino.settings import DeviceSettings, RunSettings
from sdvino.text.conditions import Conditioner

Array = NDArray[np.float32]

_SETTINGS = RunSettings(default=DeviceSettings(precision="f32", cache=False))


class FloatPipeline:
    """The components of the folder ``path`` on the CPU, one kind in memory at a time.

    Pictures have the size that ``plan`` gives their latents. UNet and autoencoder compute in what
    the quantized ones will have beside 8 bits: bf16 where that is fast, else f32. Of a UNet that
    would take more than ``part_bytes`` only a part is in memory at a time; what flows between the
    parts is in the folder ``scratch`` (None: the system's) meanwhile. ``measured`` says into which
    files the statistics of components go, those of `sdvino.compress.statistics.Recorder`.
    """

    def __init__(
        self,
        path: Path,
        plan: CalibrationPlan,
        *,
        scratch: Path | None = None,
        part_bytes: int = PART_BYTES,
        measured: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        folder = ModelFolder.open(path)
        self.scheduler = SchedulerConfig.from_dict(folder.scheduler_config)
        self._folder = folder
        self._components = Components(folder, _SETTINGS)
        self._conditioner = Conditioner(self._components)
        self._size = plan.shape[1:]
        self._guidance_scale = plan.guidance_scale
        self._scratch = scratch
        self._part_bytes = part_bytes
        self._recorders = {name: Recorder(file) for name, file in measured.items()}
        self._recorded = plan.recorded
        self._predicted = 0
        self._loaded: tuple[str, Evaluator] | None = None

    def conditions(
        self, prompt: str, negative: str | None
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """Return the UNet's inputs but for latents and timestep; see `Conditioner.unet_inputs`."""
        height, width = (side * self._folder.vae_scale_factor for side in self._size)
        request = Request(
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
        begin = self._predicted
        self._predicted += len(inputs)
        recorded = [i for i in range(len(inputs)) if begin + i in self._recorded]
        return self._evaluate("unet", inputs, recorded)

    def decode(self, latents: Array, index: int) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1].

        Of latents larger than a tile it is a tile, where the runtime may decode in tiles too: the
        decoder takes memory by the picture's area.
        """
        part = part_of(latents, index)
        shift = self._folder.shift_factor
        fed = part / np.float32(self._folder.scaling_factor)
        fed = fed if shift is None else fed + np.float32(shift)
        return fed, self._evaluate("vae_decoder", [{"latent_sample": fed}])[0]

    def finish(self, inputs: CalibrationInputs) -> None:
        """Evaluate on ``inputs`` what drawing pictures needs not, and write all statistics."""
        for name, recorder in self._recorders.items():
            if name not in ("unet", "vae_decoder"):
                self._evaluate(name, inputs.of(name))
            recorder.close()
        self._loaded = None

    def _evaluate(
        self,
        name: str,
        inputs: Sequence[Mapping[str, NDArray[Any]]],
        recorded: Sequence[int] | None = None,
    ) -> list[Array]:
        if self._loaded is None or self._loaded[0] != name:
            self._components.release()
            self._loaded = None
            self._loaded = name, self._make(name, inputs[0])
        with tempfile.TemporaryDirectory(prefix="parts-", dir=self._scratch) as folder:
            outputs = self._loaded[1].evaluate(inputs, Path(folder), recorded)
        return [np.asarray(output, np.float32) for output in outputs]

    def _make(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Evaluator:
        """Return a component as it will be quantized, for one shape; a large UNet in parts."""
        core = shared_core()
        model = core.read_model(self._folder.components[name].xml)  # its weights are mapped
        split_upsampling(model)
        if name == "unet":
            float_timestep(model)
        fix_shapes(model, inputs)
        ends = choose_ends(model, inputs, self._part_bytes) if name == "unet" else ()
        properties = compile_properties(
            DeviceSettings(), "CPU", {"CPU": device_facts(core, "CPU")}, name, eight_bits=True
        )
        return Evaluator(model, ends, properties=properties, recorder=self._recorders.get(name))


def part_of(latents: Array, index: int) -> Array:
    """Return a tile of ``latents`` float32 [1, C, h, w]: by turns its corners and its middle."""
    height, width = latents.shape[2:]
    high, wide = tile_shape(height, width)
    down, across = ((0, 0), (2, 2), (0, 2), (2, 0), (1, 1))[index % 5]
    y, x = (height - high) * down // 2, (width - wide) * across // 2
    return np.ascontiguousarray(latents[:, :, y : y + high, x : x + wide])
