"""The compiled parts of one model folder, each loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from sdvino.errors import ModelFolderError
from sdvino.folder.index import ModelFolder
from sdvino.graph.segments import BEGINNING, DEEP, END
from sdvino.graph.text_states import give_states
from sdvino.graph.vae import decoder_to_float, decoder_to_pixels, encoder_from_pixels
from sdvino.graph.walk import reshape_static
from sdvino.runtime.compiling import Edit
from sdvino.runtime.component import Component
from sdvino.runtime.guard import Guard
from sdvino.runtime.memory import return_memory
from sdvino.runtime.network import (
    PiecedUnet,
    TextKeys,
    Unet,
    UnetPlan,
    count_segments,
    prepare_text_keys,
    prepare_unet,
    unet_shapes,
)
from sdvino.settings import DeviceSettings, RunSettings

if TYPE_CHECKING:
    import openvino as ov


class Components:
    """Gives each part of a folder as a loaded `Component`, prepared for one shape at a time.

    Asking for a part in another shape replaces it: two copies of its weights are never held. A part
    that was released is known still, and loads again when it is next run or asked for.
    """

    def __init__(
        self, folder: ModelFolder, settings: RunSettings, guard: Guard | None = None
    ) -> None:
        self.folder = folder
        #: Looks for wrong numbers in what every part gives; None trusts them.
        self.guard = guard
        self.settings = settings
        #: By part; those of a UNet in several graphs are "unet.0", "unet.1" and so on.
        self._loaded: dict[str, tuple[Hashable, Component]] = {}
        #: Make the text's keys and values in a model of their own. It takes a second look at the
        #: UNet's files for each prompt: worth it for the 341 million weights of Stable Diffusion
        #: XL, hardly for the 19 million of 1.5, whose UNet computes them in 0.4 % of its time.
        self.text_apart = folder.kind.added_conditions
        self._text_keys: TextKeys | None = None
        self._segment_counts: dict[Hashable, int] = {}
        #: Given each part and its name when it is asked for; what it returns is handed out in its
        #: place. For measurements.
        self.observe: Callable[[str, Component], Component] | None = None

    def text_encoder(self, name: str, skipped: Sequence[int]) -> Component:
        """Return the text encoder ``name``, giving its states without so many of its last layers.

        Its outputs are those of `sdvino.graph.text_states.give_states`.
        """
        kind = self.folder.kind
        edit = partial(
            _prepare_text,
            skipped=tuple(skipped),
            final_norm=kind.final_norm,
            pooled=name == kind.pooled_encoder,
            length=self.folder.text_length,
        )
        return self._get(name, tuple(skipped), edit)

    def unet(self, height: int, width: int, *, batch: int = 1) -> Component:
        """Return the whole UNet for latents of ``height`` x ``width``, with a float timestep.

        It takes what the folder's own takes, and computes exactly that.
        """
        plan = UnetPlan(batch=batch)
        (name,) = self._segment_names((height, width), plan)
        self._forget("unet", {name})
        return self._segment(name, (height, width), plan)

    def unets(self, size: tuple[int, int], plans: Sequence[UnetPlan]) -> list[Unet]:
        """Return the UNet for latents of ``size`` once for each of ``plans``, and forget others.

        Their timestep is float. Those that take their text apart have the text's keys and values as
        inputs, from `text_keys`.
        """
        named = [self._segment_names(size, plan) for plan in plans]
        self._forget("unet", {"unet.text", *(name for names in named for name in names)})
        return [
            self._observed(Unet([self._segment(name, size, plan) for name in names], plan), size)
            for names, plan in zip(named, plans, strict=True)
        ]

    def _observed(self, unet: Unet, size: tuple[int, int]) -> Unet:
        """Return ``unet``, or if it is in pieces and observed one whose pieces are seen as one."""
        plan = unet.plan
        if self.observe is None or plan.pieces == 1:
            return unet
        whole = PiecedUnet(unet, unet_shapes(self.folder, *size, plan.batch))
        return Unet([self.observe("unet", cast(Component, whole))], replace(plan, pieces=1))

    def text_keys(self) -> TextKeys:
        """Return what makes the keys and values that the UNet takes in place of the text states."""
        folder = self.folder
        factor = folder.vae_scale_factor
        shapes = unet_shapes(folder, folder.height // factor, folder.width // factor)
        edit = partial(prepare_text_keys, shapes=shapes)
        component = self._get("unet.text", (), edit, load=False)
        if self._text_keys is None or self._text_keys.component is not component:
            self._text_keys = TextKeys(component)
        return self._text_keys

    def release_text_keys(self) -> None:
        """Unload what makes the text's keys and values; those made are kept."""
        if self._text_keys is not None and self._text_keys.component.loaded:
            self._text_keys.component.unload()
            return_memory()

    def _segment_names(self, size: tuple[int, int], plan: UnetPlan) -> list[str]:
        key = "unet" if plan.batch == 1 else f"unet.{plan.batch}x"
        if not plan.caches and plan.pieces == 1:
            return [key]
        if plan.caches:
            return [f"{key}.{number}" for number in (BEGINNING, DEEP, END)]
        shapes = unet_shapes(self.folder, *size, plan.batch)
        known = (size, plan.graph)
        if known not in self._segment_counts:
            counts: list[int] = []
            self._component(
                "unet", lambda model: counts.append(count_segments(model, shapes, plan))
            ).read()
            self._segment_counts[known] = counts[0]
        return [f"{key}.{number}" for number in range(self._segment_counts[known])]

    def _segment(self, name: str, size: tuple[int, int], plan: UnetPlan) -> Component:
        shapes = unet_shapes(self.folder, *size, plan.batch)
        cut = plan.caches or plan.pieces > 1
        number = int(name.rpartition(".")[2]) if cut else None
        settings = self.settings.for_component("unet")
        if plan.streams > 1:
            given = 1 if settings.num_streams is None else settings.num_streams
            settings = replace(settings, num_streams=max(plan.streams, given))
        if plan.pieces > 1 and settings.linear_kernel is None:
            # Convolutions' weights take twice as long to pack, here at every step.
            settings = replace(settings, linear_kernel="matmul")
        return self._get(
            name,
            (size, plan.graph),
            partial(prepare_unet, shapes=shapes, plan=plan, segment=number),
            settings=settings,
            load=plan.pieces == 1,
            keep_graph=plan.pieces > 1,
        )

    def vae_decoder(self, height: int, width: int, *, pixels: bool) -> Component:
        """Return the decoder for latents of ``height`` x ``width``.

        It gives uint8 pixels, or floats from 0 to 1 where they are to be blended or returned.
        """
        folder = self.folder
        edit = partial(
            _prepare_decoder,
            pixels=pixels,
            scaling=folder.scaling_factor,
            shift=folder.shift_factor,
            shape=(1, folder.latent_channels, height, width),
        )
        return self._get("vae_decoder", (height, width, pixels), edit)

    def vae_encoder(self, height: int, width: int) -> Component:
        """Return the encoder for pictures of ``height`` x ``width`` pixels."""
        edit = partial(
            _prepare_encoder,
            scaling=self.folder.scaling_factor,
            shift=self.folder.shift_factor,
            shape=(1, height, width, 3),
        )
        return self._get("vae_encoder", (height, width), edit)

    def tiny_vae(self, height: int, width: int) -> Component | None:
        """Return the small decoder for previews, or None when the folder has none."""
        if "tiny_vae" not in self.folder.components:
            return None
        shape = (1, self.folder.latent_channels, height, width)
        edit = partial(_prepare_decoder, pixels=True, scaling=1.0, shift=None, shape=shape)
        return self._get("tiny_vae", (height, width), edit)

    def release(self, *parts: str) -> None:
        """Unload the parts of these names, or all; "unet" stands for all its segments."""
        for key, (_, component) in list(self._loaded.items()):
            if not parts or key.partition(".")[0] in parts:
                component.unload()
        return_memory()

    def _forget(self, part: str, but: set[str]) -> None:
        """Unload what there is of ``part`` in other forms than those to be used."""
        for key in list(self._loaded):
            if key.partition(".")[0] == part and key not in but:
                self._loaded.pop(key)[1].unload()

    def _get(
        self,
        name: str,
        variant: Hashable,
        prepare: Edit,
        *,
        settings: DeviceSettings | None = None,
        load: bool = True,
        keep_graph: bool = False,
    ) -> Component:
        entry = self._loaded.get(name)
        if entry is None or entry[0] != variant:
            component = self._component(name, prepare, settings, keep_graph=keep_graph)
            if entry is not None:
                entry[1].unload()
            entry = self._loaded[name] = (variant, component)
        if load:
            entry[1].load()
        if self.observe is None or keep_graph:  # pieces are observed as the whole that they make
            return entry[1]
        return self.observe(name, entry[1])

    def _component(
        self,
        name: str,
        prepare: Edit,
        settings: DeviceSettings | None = None,
        *,
        keep_graph: bool = False,
    ) -> Component:
        part = name.partition(".")[0]
        files = self.folder.components.get(part)
        if files is None:
            raise ModelFolderError(
                f"The model folder {self.folder.name} has no {part}; convert the model again."
            )
        if settings is None:
            settings = self.settings.for_component(part)
        if settings.num_streams is None:
            # Each part is run once at a time: with more streams, as THROUGHPUT alone would choose,
            # it would have a share of the cores.
            settings = replace(settings, num_streams=1)
        if self.guard is not None:
            settings = self.guard.settings(part, settings)
        component = Component(
            part,
            files.xml,
            settings,
            prepare=prepare,
            keep_graph=keep_graph,
            sha256=self.folder.recorded(part),
        )
        component.guard = self.guard
        return component


# The edits say all that they do by their arguments: the cache of compiled models knows them by it.


def _prepare_text(
    model: ov.Model, *, skipped: Sequence[int], final_norm: bool, pooled: bool, length: int
) -> None:
    give_states(model, skipped, final_norm=final_norm, pooled=pooled)
    reshape_static(model, {"input_ids": [1, length]})


def _prepare_decoder(
    model: ov.Model, *, pixels: bool, scaling: float, shift: float | None, shape: Sequence[int]
) -> None:
    edit = decoder_to_pixels if pixels else decoder_to_float
    edit(model, scaling, shift)
    reshape_static(model, {"latent_sample": shape})


def _prepare_encoder(
    model: ov.Model, *, scaling: float, shift: float | None, shape: Sequence[int]
) -> None:
    encoder_from_pixels(model, scaling, shift)
    reshape_static(model, {"sample": shape})
