"""A network as the denoising loop asks it: stages, run in turn over named tensors.

A pool holds all tensors of one prediction by name: what it begins with, and what the stages give. A
stage reads from it what its inputs are called. One whole graph is a network, and so are the stages
that step caching leaves one out of, and the pieces of which one at a time is in memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError
from sdvino.graph.protocol import InferenceComponent
from sdvino.graph.text_keys import TEXT, is_text_key
from sdvino.runtime.component import Component
from sdvino.runtime.memory import return_memory

Array = NDArray[np.float32]
Pool = MutableMapping[str, NDArray[Any]]
#: Prompts whose keys and values are kept: both of a picture, and both of the next.
KEPT_PROMPTS = 4
#: What the last stage of a network gives.
PREDICTION = "out_sample"


class Stage(InferenceComponent, Protocol):
    """A graph that runs: `sdvino.runtime.component.Component` is one, and so is `Network`."""

    @property
    def input_names(self) -> Sequence[frozenset[str]]:
        """The names of each input."""

    def infer_each(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], *, together: bool = False
    ) -> Sequence[Mapping[str, NDArray[Any]]]:
        """Return the outputs for each of ``inputs``, all valid until the next call."""

    def unload(self) -> None:
        """Give the memory back; the next run loads again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """How a network is made ready and run."""

    #: Latents in one evaluation.
    batch: int = 1
    #: Evaluations side by side.
    streams: int = 1
    #: See `sdvino.settings.SpeedSettings`.
    token_downsampling: int = 1
    cache_interval: int = 1
    cache_branch: int = 0
    #: Stages of equal weights, of which one at a time is in memory; 1: the whole stays.
    pieces: int = 1
    #: Keys and values of the text are made by a model of their own.
    text_apart: bool = False

    @property
    def caches(self) -> bool:
        """Whether the deep stage is left out at some steps."""
        return self.cache_interval > 1

    @property
    def cut(self) -> dict[str, int]:
        """Where the graph is cut; see `sdvino.graph.prepare.prepare_unet`."""
        return {"branch": self.cache_branch} if self.caches else {"pieces": self.pieces}


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
    """One of the predictions of a picture: what the network is told, and what is used again."""

    #: By input name, float32, of the network's batch.
    conditions: Mapping[str, Array]
    #: Outputs of the stages that may be left out, as they last ran.
    kept: dict[str, Array] = field(default_factory=dict)


def both_in_one(cond: Mapping[str, Array], uncond: Mapping[str, Array]) -> dict[str, Array]:
    """Return the conditions of a batch of two."""
    return {name: np.concatenate([cond[name], uncond[name]]) for name in cond}


class Network:
    """Stages for one picture, run in turn.

    ``together``: each runs on all pools at once. With an ``interval`` above 1 the stages ``reused``
    run at every so many steps only, what they gave last being used again. ``in_turn``: each stage
    is loaded, run on all pools, and unloaded, unless it is the only one. A network is a `Stage`
    itself, with the inputs ``input_names``.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        batch: int = 1,
        together: bool = False,
        in_turn: bool = False,
        reused: Collection[int] = (),
        interval: int = 1,
        input_names: Iterable[str] = (),
    ) -> None:
        self.batch = batch
        self.input_names = tuple(frozenset({name}) for name in input_names)
        self._stages = stages
        self._together = together
        self._in_turn = in_turn
        self._reused = reused
        self._interval = interval
        #: By stage: what its inputs may be called, and what it gives.
        self._inputs: dict[int, Sequence[frozenset[str]]] = {}
        self._given: dict[int, tuple[str, ...]] = {}
        self._timestep = np.empty(1, np.float32)

    @property
    def hardware(self) -> tuple[str, ...]:
        """The devices that it may run on; none while it is in pieces, or observed."""
        first = self._stages[0]
        return first.hardware if isinstance(first, Component) and not self._in_turn else ()

    def evaluate(self, x_in: Array, t: float, step: int, branches: Sequence[Branch]) -> list[Array]:
        """Return each branch's raw prediction, float32 [N, C, h, w], for ``x_in`` at ``t``.

        ``step`` counts the steps of the picture from 0. The arrays are views that the next call
        writes again.
        """
        fresh = step % self._interval == 0 or not all(branch.kept for branch in branches)
        self._timestep[0] = t
        given = {"sample": x_in, "timestep": self._timestep}
        pools: list[Pool] = [{**given, **branch.conditions} for branch in branches]
        if not fresh:
            for pool, branch in zip(pools, branches, strict=True):
                pool.update(branch.kept)
        self.run(pools, () if fresh else self._reused)
        if fresh:
            names = [name for number in self._reused for name in self._given[number]]
            for pool, branch in zip(pools, branches, strict=True):
                branch.kept = {name: np.array(pool[name]) for name in names}
        return [prediction_of(pool) for pool in pools]

    def run(
        self,
        pools: Sequence[Pool],
        left_out: Collection[int] = (),
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Run the stages on each of ``pools``, but for those ``left_out``.

        ``progress`` is called with the share done where the stages run in turn.
        """
        for number, stage in enumerate(self._stages):
            if number in left_out:
                continue
            if number not in self._inputs:
                self._inputs[number] = list(stage.input_names)
            wanted = names_in_pool(self._inputs[number], pools[0])
            if not self._in_turn:
                results = stage.infer_each(
                    [{name: pool[name] for name in wanted} for pool in pools],
                    together=self._together,
                )
                for pool, outputs in zip(pools, results, strict=True):
                    pool.update(outputs)
                self._given[number] = tuple(results[0])
                continue
            for done, pool in enumerate(pools, 1):
                outputs = stage.infer({name: pool[name] for name in wanted})
                # With the stage go the arrays that it gave.
                pool.update({name: np.array(value) for name, value in outputs.items()})
                progress((number + done / len(pools)) / len(self._stages))
            if len(self._stages) > 1:
                stage.unload()
                return_memory()

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Return the prediction for all that the network takes, by name."""
        return self.infer_each([inputs])[0]

    def infer_each(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], *, together: bool = False
    ) -> list[Mapping[str, NDArray[Any]]]:
        """Return the predictions for all of ``inputs``; how they run is the network's own choice.

        In turn each stage is loaded once for all of them.
        """
        pools: list[Pool] = [dict(given) for given in inputs]
        self.run(pools)
        return [{PREDICTION: prediction_of(pool)} for pool in pools]

    def unload(self) -> None:
        """Unload the stages."""
        for stage in self._stages:
            stage.unload()


def prediction_of(pool: Mapping[str, NDArray[Any]]) -> Array:
    """Return what the network gave; raises ModelFolderError where it gave nothing of the name."""
    if PREDICTION not in pool:
        raise ModelFolderError(f"The model gives no {PREDICTION}; get the model again.")
    return pool[PREDICTION]


def names_in_pool(inputs: Iterable[Iterable[str]], pool: Mapping[str, NDArray[Any]]) -> list[str]:
    """Return for each input of a stage, given by all its names, the one that ``pool`` knows.

    Raises ModelFolderError for an input that nothing gives.
    """
    known = [next((name for name in sorted(names) if name in pool), None) for names in inputs]
    if None in known:
        raise ModelFolderError("The model has an input that nothing gives; get the model again.")
    return [name for name in known if name is not None]
