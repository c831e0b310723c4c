"""The UNet as the denoising loop asks it: in one graph or in segments, for one prompt or two."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError
from sdvino.families import TIME_IDS
from sdvino.folder.index import ModelFolder
from sdvino.graph.geglu import split_projections
from sdvino.graph.scales import fold_scales
from sdvino.graph.segments import (
    DEEP,
    Segments,
    cut_at_skip,
    cut_by_weight,
    keep_segment,
    names_in_pool,
    segment_count,
)
from sdvino.graph.text_keys import TEXT, give_text_keys, is_text_key, take_text_keys
from sdvino.graph.timestep import float_timestep
from sdvino.graph.tokens import thin_keys
from sdvino.graph.walk import freeze_shapes, reshape_static
from sdvino.runtime.component import Component
from sdvino.runtime.memory import return_memory

Array = NDArray[np.float32]
#: Prompts whose keys and values are kept: both of a picture, and both of the next.
KEPT_PROMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetPlan:
    """How the UNet is made ready and run."""

    #: Latents in one evaluation.
    batch: int = 1
    #: Evaluations side by side.
    streams: int = 1
    #: See `sdvino.settings.SpeedSettings`.
    token_downsampling: int = 1
    cache_interval: int = 1
    cache_branch: int = 0
    #: Segments of equal weights, of which one at a time is in memory; 1: the whole UNet stays.
    pieces: int = 1
    #: Keys and values of the text are made by a model of their own.
    text_apart: bool = False

    @property
    def graph(self) -> tuple[object, ...]:
        """What of the plan tells compiled graphs apart."""
        branch = self.cache_branch if self.caches else None
        apart = self.text_apart
        return self.batch, self.streams, self.token_downsampling, branch, self.pieces, apart

    @property
    def caches(self) -> bool:
        """Whether the deep segment is left out at some steps."""
        return self.cache_interval > 1


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


def prepare_unet(
    model: ov.Model, shapes: Mapping[str, Sequence[int]], plan: UnetPlan, segment: int | None
) -> None:
    """Rewrite the exported UNet ``model``, in place, for ``plan``, and keep only one segment."""
    _prepare(model, shapes)
    if plan.text_apart:
        take_text_keys(model)
    if plan.token_downsampling > 1:
        height, width = shapes["sample"][-2:]
        thin_keys(model, plan.token_downsampling, (height, width))
    if segment is not None:
        keep_segment(model, _segments(model, plan), segment)


def prepare_text_keys(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Rewrite the exported UNet ``model``, in place, into what it makes of the text alone."""
    _prepare(model, shapes)
    give_text_keys(model)


def count_segments(model: ov.Model, shapes: Mapping[str, Sequence[int]], plan: UnetPlan) -> int:
    """Return how many segments `prepare_unet` cuts ``model`` into; rewrites it as that does."""
    prepare_unet(model, shapes, plan, None)
    return segment_count(_segments(model, plan))


def _prepare(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Make the exact rewrites that both parts of a UNet share, so that their tensors agree."""
    float_timestep(model)
    reshape_static(model, shapes)
    freeze_shapes(model)
    split_projections(model)
    fold_scales(model)


def _segments(model: ov.Model, plan: UnetPlan) -> Segments:
    if plan.caches:
        return cut_at_skip(model, plan.cache_branch)
    return cut_by_weight(model, plan.pieces)


class TextKeys:
    """Keys and values of a prompt, computed once and kept for as long as few others follow."""

    def __init__(self, component: Component, kept: int = KEPT_PROMPTS) -> None:
        self.component = component
        self._kept = kept
        self._known: OrderedDict[bytes, dict[str, Array]] = OrderedDict()

    def __call__(self, conditions: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``conditions`` with the text states replaced by their keys and values."""
        states = conditions[TEXT]
        key = hashlib.sha256(states.tobytes()).digest()
        known = self._known.get(key)
        if known is None:
            outputs = self.component.infer({TEXT: states})
            known = {
                name: np.array(value, np.float32)
                for name, value in outputs.items()
                if is_text_key(name)
            }
            self._known[key] = known
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return {**{k: v for k, v in conditions.items() if k != TEXT}, **known}


@dataclass(slots=True)
class Branch:
    """One of the predictions of a picture: what the UNet is told, and what is kept of its depth."""

    #: By input name, float32, of the plan's batch.
    conditions: Mapping[str, Array]
    #: Outputs of the deep segment when it last ran.
    kept: dict[str, Array] = field(default_factory=dict)


def both_in_one(cond: Mapping[str, Array], uncond: Mapping[str, Array]) -> dict[str, Array]:
    """Return the conditions of a batch of two."""
    return {name: np.concatenate([cond[name], uncond[name]]) for name in cond}


class Unet:
    """A UNet for one picture: compiled segments, run in turn.

    With step caching the deep one is left out but at every so many steps, what it gave then being
    used again; all branches of a step do alike. With pieces every segment is loaded, run for all
    branches, and unloaded.
    """

    def __init__(self, segments: Sequence[Component], plan: UnetPlan) -> None:
        self.plan = plan
        self._segments = segments
        self._inputs: dict[int, list[frozenset[str]]] = {}
        self._timestep = np.empty(1, np.float32)

    @property
    def hardware(self) -> tuple[str, ...]:
        """The devices that it may run on; none while it is in pieces, or observed."""
        first = self._segments[0]
        stays = self.plan.pieces == 1 and isinstance(first, Component)
        return first.hardware if stays else ()

    def evaluate(self, x_in: Array, t: float, step: int, branches: Sequence[Branch]) -> list[Array]:
        """Return each branch's raw prediction, float32 [N, C, h, w], for ``x_in`` at ``t``.

        ``step`` counts timesteps from 0: the deep segment runs at every so many of them, and where
        nothing of it is kept. The arrays are views that the next call writes again.
        """
        fresh = step % self.plan.cache_interval == 0
        fresh = fresh or not all(branch.kept for branch in branches)
        self._timestep[0] = t
        given = {"sample": x_in, "timestep": self._timestep}
        pools: list[dict[str, Array]] = [{**given, **branch.conditions} for branch in branches]
        for number in range(len(self._segments)):
            deep = self.plan.caches and number == DEEP
            if deep and not fresh:
                for pool, branch in zip(pools, branches, strict=True):
                    pool.update(branch.kept)
                continue
            for pool, branch, outputs in zip(
                pools, branches, self._run(number, pools), strict=True
            ):
                pool.update(outputs)
                if deep:
                    branch.kept = {name: np.array(value) for name, value in outputs.items()}
        return _predictions(pools)

    def _run(self, number: int, pools: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        segment = self._segments[number]
        if number not in self._inputs:
            self._inputs[number] = list(segment.input_names)
        wanted = names_in_pool(self._inputs[number], pools[0])
        results = segment.infer_each(
            [{name: pool[name] for name in wanted} for pool in pools],
            together=self.plan.streams > 1,
        )
        if self.plan.pieces == 1:
            return [dict(result) for result in results]
        copies = [{k: np.array(v) for k, v in result.items()} for result in results]
        segment.unload()  # with it go the arrays that it gave
        return_memory()
        return copies

    def predict_each(self, inputs: Sequence[Mapping[str, Array]]) -> list[Array]:
        """Return the raw prediction for each of ``inputs``: all that the UNet takes, by name.

        For a UNet in pieces: each is loaded once for all of them.
        """
        pools = [dict(given) for given in inputs]
        for number in range(len(self._segments)):
            for pool, outputs in zip(pools, self._run(number, pools), strict=True):
                pool.update(outputs)
        return _predictions(pools)


def _predictions(pools: Sequence[Mapping[str, Array]]) -> list[Array]:
    if "out_sample" not in pools[0]:
        raise ModelFolderError("The graph of the unet has no out_sample; get the model again.")
    return [pool["out_sample"] for pool in pools]


class PiecedUnet:
    """A UNet in pieces, to be asked as one component is: for what observes components."""

    def __init__(self, unet: Unet, names: Iterable[str]) -> None:
        """``names`` are the inputs of the whole."""
        self._unet = unet
        self.input_names = tuple(frozenset({name}) for name in names)

    def infer(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the prediction, "out_sample"."""
        return self.infer_each([inputs])[0]

    def infer_each(
        self, inputs: Sequence[Mapping[str, Array]], *, together: bool = False
    ) -> list[Mapping[str, Array]]:
        """Return the predictions for all of ``inputs``; pieces never run ``together``."""
        return [{"out_sample": result} for result in self._unet.predict_each(inputs)]
