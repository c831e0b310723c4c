"""The compiled parts of one model folder, each loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from sdvino.errors import ModelFolderError
from sdvino.graph.shapes import reshape_static
from sdvino.graph.text_states import give_states
from sdvino.graph.timestep import float_timestep
from sdvino.graph.vae import decoder_to_float, decoder_to_pixels, encoder_from_pixels
from sdvino.model_folder import ModelFolder
from sdvino.pipeline_kinds import TIME_IDS
from sdvino.runtime.component import Component
from sdvino.runtime.guard import Guard
from sdvino.settings import RunSettings

if TYPE_CHECKING:
    import openvino as ov


def unet_shapes(
    folder: ModelFolder, height: int, width: int, batch: int = 1
) -> dict[str, list[int]]:
    """Return the shapes of the UNet's inputs, by name, for latents of ``height`` x ``width``."""
    shapes = {
        "sample": [batch, folder.in_channels, height, width],
        "timestep": [1],
        "encoder_hidden_states": [batch, folder.text_length, folder.cross_attention_dim],
    }
    if folder.pooled_width is not None:
        shapes |= {"text_embeds": [batch, folder.pooled_width], "time_ids": [batch, TIME_IDS]}
    if folder.guidance_width is not None:
        shapes["timestep_cond"] = [batch, folder.guidance_width]
    return shapes


class Components:
    """Gives each part of a folder as a loaded `Component`, prepared for one shape at a time.

    Asking for a part in another shape replaces it: two copies of its weights are never held.
    """

    def __init__(
        self, folder: ModelFolder, settings: RunSettings, guard: Guard | None = None
    ) -> None:
        self.folder = folder
        #: Looks for wrong numbers in what every part gives; None trusts them.
        self.guard = guard
        self.settings = settings
        self._loaded: dict[str, tuple[Hashable, Component]] = {}
        #: Given each part and its name when it is asked for; what it returns is handed out in its
        #: place. For measurements.
        self.observe: Callable[[str, Component], Component] | None = None

    def text_encoder(self, name: str, skipped: Sequence[int]) -> Component:
        """Return the text encoder ``name``, giving its states without so many of its last layers.

        Its outputs are those of `sdvino.graph.text_states.give_states`.
        """
        kind = self.folder.kind

        def prepare(model: ov.Model) -> None:
            pooled = name == kind.pooled_encoder
            give_states(model, skipped, final_norm=kind.final_norm, pooled=pooled)
            reshape_static(model, {"input_ids": [1, self.folder.text_length]})

        return self._get(name, tuple(skipped), prepare)

    def unet(self, height: int, width: int, *, batch: int = 1) -> Component:
        """Return the UNet for latents of ``height`` x ``width``, with a float timestep."""
        shapes = unet_shapes(self.folder, height, width, batch)

        def prepare(model: ov.Model) -> None:
            float_timestep(model)
            reshape_static(model, shapes)

        return self._get("unet", (height, width, batch), prepare)

    def vae_decoder(self, height: int, width: int, *, pixels: bool) -> Component:
        """Return the decoder for latents of ``height`` x ``width``.

        It gives uint8 pixels, or floats from 0 to 1 where they are to be blended or returned.
        """
        folder = self.folder

        def prepare(model: ov.Model) -> None:
            edit = decoder_to_pixels if pixels else decoder_to_float
            edit(model, folder.scaling_factor, folder.shift_factor)
            reshape_static(model, {"latent_sample": [1, folder.latent_channels, height, width]})

        return self._get("vae_decoder", (height, width, pixels), prepare)

    def vae_encoder(self, height: int, width: int) -> Component:
        """Return the encoder for pictures of ``height`` x ``width`` pixels."""

        def prepare(model: ov.Model) -> None:
            encoder_from_pixels(model, self.folder.scaling_factor, self.folder.shift_factor)
            reshape_static(model, {"sample": [1, height, width, 3]})

        return self._get("vae_encoder", (height, width), prepare)

    def tiny_vae(self, height: int, width: int) -> Component | None:
        """Return the small decoder for previews, or None when the folder has none."""
        if "tiny_vae" not in self.folder.components:
            return None

        def prepare(model: ov.Model) -> None:
            decoder_to_pixels(model, 1.0)
            reshape_static(
                model, {"latent_sample": [1, self.folder.latent_channels, height, width]}
            )

        return self._get("tiny_vae", (height, width), prepare)

    def release(self, name: str | None = None) -> None:
        """Unload one part, or all."""
        for key in list(self._loaded) if name is None else [name]:
            entry = self._loaded.pop(key, None)
            if entry is not None:
                entry[1].unload()

    def _get(self, name: str, variant: Hashable, prepare: Callable[[Any], None]) -> Component:
        component = self._prepared(name, variant, prepare)
        return component if self.observe is None else self.observe(name, component)

    def _prepared(self, name: str, variant: Hashable, prepare: Callable[[Any], None]) -> Component:
        entry = self._loaded.get(name)
        if entry is not None and entry[0] == variant:
            return entry[1]
        files = self.folder.components.get(name)
        if files is None:
            raise ModelFolderError(
                f"The model folder {self.folder.name} has no {name}; convert the model again."
            )
        self.release(name)
        settings = self.settings.for_component(name)
        if self.guard is not None:
            settings = self.guard.settings(name, settings)
        component = Component(name, files.xml, settings, prepare=prepare)
        component.guard = self.guard
        component.load()
        self._loaded[name] = (variant, component)
        return component
