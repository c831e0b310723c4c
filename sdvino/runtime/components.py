"""The compiled parts of one model folder, each loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from sdvino.errors import ModelFolderError
from sdvino.families import TIME_IDS
from sdvino.folder.index import ModelFolder
from sdvino.graph.cut import BEGINNING, DEEP, END
from sdvino.graph.edit import Edit
from sdvino.graph.prepare import (
    count_stages,
    prepare_decoder,
    prepare_encoder,
    prepare_text_encoder,
    prepare_text_keys,
    prepare_unet,
)
from sdvino.graph.text_keys import TEXT
from sdvino.runtime.component import Component
from sdvino.runtime.guard import Guard
from sdvino.runtime.memory import return_memory
from sdvino.runtime.network import Network, NetworkPlan, TextKeys
from sdvino.settings import DeviceSettings, RunSettings


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
        #: By part, with what it was asked for with; see `parts`.
        self._known: dict[str, tuple[tuple[Edit, DeviceSettings], Component]] = {}
        #: Make the text's keys and values in a model of their own. It takes a second look at the
        #: UNet's files for each prompt: worth it for the 341 million weights of Stable Diffusion
        #: XL, hardly for the 19 million of 1.5, whose UNet computes them in 0.4 % of its time.
        self.text_apart = folder.kind.added_conditions
        self._text_keys: TextKeys | None = None
        #: Of UNets in pieces, how many they are.
        self._pieces: dict[tuple[tuple[int, int], NetworkPlan], int] = {}
        #: Given each part and its name when it is asked for; what it returns is handed out in its
        #: place. For measurements.
        self.observe: Callable[[str, Component], Component] | None = None

    @property
    def parts(self) -> Mapping[str, Component]:
        """The parts asked for and not forgotten, loaded or not.

        The stages of a UNet are "unet.0", "unet.1" and so on.
        """
        return {name: component for name, (_, component) in self._known.items()}

    def text_encoder(self, name: str, skipped: Sequence[int]) -> Component:
        """Return the text encoder ``name``, giving its states without so many of its last layers.

        Its outputs are those of `sdvino.graph.text_states.give_states`.
        """
        kind = self.folder.kind
        edit = Edit.of(
            prepare_text_encoder,
            skipped=tuple(skipped),
            final_norm=kind.final_norm,
            pooled=name == kind.pooled_encoder,
            length=self.folder.text_length,
        )
        return self._get(name, edit)

    def unet(self, height: int, width: int, *, batch: int = 1) -> Component:
        """Return the whole UNet for latents of ``height`` x ``width``, with a float timestep.

        It takes what the folder's own takes, and computes exactly that.
        """
        plan = NetworkPlan(batch=batch)
        (name,) = self._stage_names((height, width), plan)
        self._forget("unet", {name})
        return self._stage(name, (height, width), plan)

    def unets(self, size: tuple[int, int], plans: Sequence[NetworkPlan]) -> list[Network]:
        """Return the UNet for latents of ``size`` once for each of ``plans``, and forget others.

        Their timestep is float. Those that take their text apart have the text's keys and values as
        inputs, from `text_keys`.
        """
        named = [self._stage_names(size, plan) for plan in plans]
        self._forget("unet", {"unet.text", *(name for names in named for name in names)})
        return [
            self._network([self._stage(name, size, plan) for name in names], size, plan)
            for names, plan in zip(named, plans, strict=True)
        ]

    def _network(
        self, stages: Sequence[Component], size: tuple[int, int], plan: NetworkPlan
    ) -> Network:
        """Return the stages as a network; of observed pieces the whole that they make is seen."""
        network = Network(
            stages,
            batch=plan.batch,
            together=plan.streams > 1,
            in_turn=plan.pieces > 1,
            reused=(DEEP,) if plan.caches else (),
            interval=plan.cache_interval,
            input_names=unet_shapes(self.folder, *size, plan.batch),
        )
        if self.observe is None or plan.pieces == 1:
            return network
        return Network([self.observe("unet", cast(Component, network))], batch=plan.batch)

    def text_keys(self) -> TextKeys:
        """Return what makes the keys and values that the UNet takes in place of the text states."""
        folder = self.folder
        factor = folder.vae_scale_factor
        shapes = unet_shapes(folder, folder.height // factor, folder.width // factor)
        edit = Edit.of(prepare_text_keys, shapes=shapes)
        component = self._get("unet.text", edit, load=False)
        if self._text_keys is None or self._text_keys.component is not component:
            self._text_keys = TextKeys(component)
        return self._text_keys

    def release_text_keys(self) -> None:
        """Unload what makes the text's keys and values; those made are kept."""
        if self._text_keys is not None and self._text_keys.component.loaded:
            self._text_keys.component.unload()
            return_memory()

    def _stage_names(self, size: tuple[int, int], plan: NetworkPlan) -> list[str]:
        key = "unet" if plan.batch == 1 else f"unet.{plan.batch}x"
        if plan.caches:
            return [f"{key}.{number}" for number in (BEGINNING, DEEP, END)]
        if plan.pieces == 1:
            return [key]
        if (size, plan) not in self._pieces:
            settings = self.settings.for_component("unet")
            whole = self._component("unet", self._unet_edit(size, plan), settings).read()
            self._pieces[size, plan] = count_stages(whole, **plan.cut)
        return [f"{key}.{number}" for number in range(self._pieces[size, plan])]

    def _unet_edit(
        self, size: tuple[int, int], plan: NetworkPlan, stage: int | None = None
    ) -> Edit:
        cut = {} if stage is None else {**plan.cut, "stage": stage}
        return Edit.of(
            prepare_unet,
            shapes=unet_shapes(self.folder, *size, plan.batch),
            text_apart=plan.text_apart,
            token_downsampling=plan.token_downsampling,
            **cut,
        )

    def _stage(self, name: str, size: tuple[int, int], plan: NetworkPlan) -> Component:
        settings = self.settings.for_component("unet")
        if plan.streams > 1:
            given = 1 if settings.num_streams is None else settings.num_streams
            settings = replace(settings, num_streams=max(plan.streams, given))
        if plan.pieces > 1 and settings.linear_kernel is None:
            # Convolutions' weights take twice as long to pack, here at every step.
            settings = replace(settings, linear_kernel="matmul")
        cut, in_turn = plan.caches or plan.pieces > 1, plan.pieces > 1
        edit = self._unet_edit(size, plan, int(name.rpartition(".")[2]) if cut else None)
        return self._get(name, edit, settings, load=not in_turn, keep_graph=in_turn)

    def vae_decoder(self, height: int, width: int, *, pixels: bool) -> Component:
        """Return the decoder for latents of ``height`` x ``width``.

        It gives uint8 pixels, or floats from 0 to 1 where they are to be blended or returned.
        """
        edit = Edit.of(
            prepare_decoder,
            pixels=pixels,
            scaling=self.folder.scaling_factor,
            shift=self.folder.shift_factor,
            shape=(1, self.folder.latent_channels, height, width),
        )
        return self._get("vae_decoder", edit)

    def vae_encoder(self, height: int, width: int) -> Component:
        """Return the encoder for pictures of ``height`` x ``width`` pixels."""
        edit = Edit.of(
            prepare_encoder,
            scaling=self.folder.scaling_factor,
            shift=self.folder.shift_factor,
            shape=(1, height, width, 3),
        )
        return self._get("vae_encoder", edit)

    def tiny_vae(self, height: int, width: int) -> Component | None:
        """Return the small decoder for previews, or None when the folder has none."""
        if "tiny_vae" not in self.folder.components:
            return None
        shape = (1, self.folder.latent_channels, height, width)
        edit = Edit.of(prepare_decoder, pixels=True, scaling=1.0, shift=None, shape=shape)
        return self._get("tiny_vae", edit)

    def release(self, *parts: str) -> None:
        """Unload the parts of these names, or all; "unet" stands for all its stages."""
        for name, component in self.parts.items():
            if not parts or name.partition(".")[0] in parts:
                component.unload()
        return_memory()

    def _forget(self, part: str, but: set[str]) -> None:
        """Unload what there is of ``part`` in other forms than those to be used."""
        for name in list(self._known):
            if name.partition(".")[0] == part and name not in but:
                self._known.pop(name)[1].unload()

    def _get(
        self,
        name: str,
        edit: Edit,
        settings: DeviceSettings | None = None,
        *,
        load: bool = True,
        keep_graph: bool = False,
    ) -> Component:
        if settings is None:
            settings = self.settings.for_component(name.partition(".")[0])
        entry = self._known.get(name)
        if entry is None or entry[0] != (edit, settings):
            component = self._component(name, edit, settings, keep_graph=keep_graph)
            if entry is not None:
                entry[1].unload()
            entry = self._known[name] = ((edit, settings), component)
        if load:
            entry[1].load()
        if self.observe is None or keep_graph:  # pieces are observed as the whole that they make
            return entry[1]
        return self.observe(name, entry[1])

    def _component(
        self, name: str, edit: Edit, settings: DeviceSettings, *, keep_graph: bool = False
    ) -> Component:
        part = name.partition(".")[0]
        files = self.folder.components.get(part)
        if files is None:
            raise ModelFolderError(
                f"The model folder {self.folder.name} has no {part}; convert the model again."
            )
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
            prepare=edit,
            keep_graph=keep_graph,
            sha256=self.folder.recorded(part),
        )
        component.guard = self.guard
        return component


def unet_shapes(
    folder: ModelFolder, height: int, width: int, batch: int = 1
) -> dict[str, list[int]]:
    """Return the shapes of the UNet's inputs, by name, for latents of ``height`` x ``width``."""
    shapes = {
        "sample": [batch, folder.in_channels, height, width],
        "timestep": [1],
        TEXT: [batch, folder.text_length, folder.cross_attention_dim],
    }
    if folder.pooled_width is not None:
        shapes |= {"text_embeds": [batch, folder.pooled_width], "time_ids": [batch, TIME_IDS]}
    if folder.guidance_width is not None:
        shapes["timestep_cond"] = [batch, folder.guidance_width]
    return shapes
