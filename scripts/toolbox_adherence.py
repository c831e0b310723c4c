"""What each variant draws: prompt adherence, paired with the reference, and likeness by pixels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluate_demo import (
    GUIDANCE_SCALE,
    Share,
    Verdicts,
    column,
    held_out_tasks,
    paired_difference,
    wilson,
)
from measure_compression import CAP, Pictures, draw, hashed, weights_of
from numpy.typing import NDArray
from toolbox_variants import REFERENCE, STEPS, Variant

from sdvino.compress.similarity import psnr
from sdvino.folder.index import ModelFolder


@dataclass(frozen=True, slots=True)
class Adherence:
    """How one variant draws; shares from 0 to 1, PSNR in dB."""

    #: What tells the folder's weights from others', and what its records are called.
    weights: str
    stem: str
    steps: int
    guidance_scale: float
    prompts: int
    right: Share
    #: Against the reference on the same prompts and seeds; None for the reference.
    difference: Share | None
    #: Against the variant's `versus`, where it has been drawn.
    versus: Share | None
    #: Against the reference's pictures, median and lowest tenth; None where steps or guidance
    #: are others, and so the pictures.
    psnr: float | None
    psnr_tenth: float | None

    @property
    def lost(self) -> float:
        """The points lost against the reference at the far end of the interval."""
        return 0.0 if self.difference is None else max(0.0, -100.0 * self.difference.low)


@dataclass(frozen=True, slots=True)
class _Drawn:
    verdicts: Verdicts
    pictures: Pictures
    whole: bool


class Gallery:
    """Draws variants one after another, into ``record``; what is there is not drawn again."""

    def __init__(
        self,
        record: Path,
        prompts: int,
        known: Mapping[str, Adherence],
        say: Callable[[str], None],
    ) -> None:
        """``known``: what earlier runs found, by variant; their records are below ``record``."""
        self._record = record
        self._known = known
        self._say = say
        self._tasks = held_out_tasks(prompts)
        self._drawn: dict[str, _Drawn] = {}
        #: The share of the last variant's pictures that no earlier run had drawn.
        self.fresh = 0.0

    def draw(self, variant: Variant, folder: Path, prompts: int) -> Adherence:
        """Return how ``variant`` draws the first ``prompts`` of the tasks, from its ``folder``.

        The reference comes first. Steps and guidance are the variant's, or, of a finished source,
        those that its folder suggests.
        """
        steps, guidance = settings_of(variant, folder)
        weights = weights_of(folder)
        # One source's weights may come with another's scheduler, which draws other pictures.
        told = weights if variant.student is None else f"{weights} {_scheduler_of(folder)}"
        stem = stem_of(folder, told, steps, guidance)
        tasks = self._tasks[:prompts]
        self._say(f"{variant.name}: {len(tasks)} pictures, {steps} steps, guidance {guidance:g}")
        pictures = Pictures(self._record / "pictures" / stem)
        record = self._record / f"{stem}.record"
        self.fresh = 1.0 - min(len(tasks), _recorded(record)) / len(tasks)
        verdicts = draw(folder, tasks, pictures, record, steps, guidance)
        found = _Drawn(verdicts, pictures, (steps, guidance) == (STEPS, GUIDANCE_SCALE))
        self._drawn[variant.name] = found
        reference = self._drawn[REFERENCE]
        near = None if variant.name == REFERENCE or not found.whole else likeness(reference, found)
        other = None if variant.versus is None else self._right(variant.versus)
        right = column(found.verdicts, "right")
        return Adherence(
            weights=weights,
            stem=stem,
            steps=steps,
            guidance_scale=guidance,
            prompts=len(right),
            right=wilson(int(right.sum()), len(right)),
            difference=None
            if variant.name == REFERENCE
            else paired(column(reference.verdicts, "right"), right),
            versus=None if other is None else paired(other, right),
            psnr=None if near is None else near[0],
            psnr_tenth=None if near is None else near[1],
        )

    def _right(self, name: str) -> NDArray[np.bool_] | None:
        """Return which pictures of another variant are right; None where it has none yet."""
        if name in self._drawn:
            return column(self._drawn[name].verdicts, "right")
        known = self._known.get(name)
        path = None if known is None else self._record / f"{known.stem}.record"
        if path is None or not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        return column(np.array([json.loads(line) for line in lines[1:]], bool), "right")


def settings_of(variant: Variant, folder: Path) -> tuple[int, float]:
    """Return steps and guidance: the variant's, or what the folder of a student suggests."""
    suggested = ModelFolder.open(folder).suggested
    if variant.student is None or suggested.num_inference_steps is None:
        return variant.steps, variant.guidance_scale
    scale = suggested.guidance_scale
    return suggested.num_inference_steps, variant.guidance_scale if scale is None else scale


def _recorded(path: Path) -> int:
    """Return how many verdicts stand in a record, below its head."""
    return len(path.read_bytes().splitlines()) - 1 if path.is_file() else 0


def _scheduler_of(folder: Path) -> str:
    opened = ModelFolder.open(folder)
    return f"{sorted(opened.scheduler_config.items())} {opened.suggested.scheduler}"


def stem_of(folder: Path, weights: str, steps: int, guidance_scale: float) -> str:
    """Return what the records of ``folder`` are called, as measure_compression calls its own."""
    guided = "" if guidance_scale == GUIDANCE_SCALE else f"-g{guidance_scale:g}"
    return f"{folder.name}-{steps}{guided}-{hashed(weights)}"


def paired(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Share:
    """Return the paired difference over the prompts that both have; bool [n] each."""
    count = min(len(before), len(after))
    return paired_difference(before[:count], after[:count])


def likeness(reference: _Drawn, other: _Drawn) -> tuple[float, float]:
    """Return the median and the lowest tenth of the PSNR, in dB, of equal pictures CAP."""
    count = min(len(reference.verdicts), len(other.verdicts))
    pairs = zip(reference.pictures.load(count), other.pictures.load(count), strict=True)
    decibels = [min(CAP, psnr(*pair)) for pair in pairs]
    return float(np.median(decibels)), float(np.quantile(decibels, 0.1))


class TimeLeft:
    """Tells how long the variants that are left will take, from those that are done."""

    def __init__(self, costs: Mapping[str, float]) -> None:
        """``costs``: evaluations of the UNet by variant, as `evaluations` counts them."""
        self._left = dict(costs)
        self._since = time.monotonic()
        self._rate = 0.0

    def done(self, name: str, fresh: float) -> str:
        """Return words on what is left now that ``name`` is finished, ``fresh`` of it only now."""
        cost = self._left.pop(name) * fresh
        now = time.monotonic()
        if cost:
            self._rate = (now - self._since) / cost
        self._since = now
        minutes = self._rate * sum(self._left.values()) / 60
        about = f", {minutes:.0f} min at most" if minutes else ""
        return f"{len(self._left)} variants left{about}"


def evaluations(variant: Variant, prompts: int) -> float:
    """Return the evaluations of the UNet that ``prompts`` pictures take, and one for the rest."""
    return prompts * (variant.steps * (1 if variant.guidance_scale == 1.0 else 2) + 1)


def prompts_for(variants: Sequence[Variant], prompts: int, curve: int) -> dict[str, int]:
    """Return how many pictures of each variant are drawn."""
    return {variant.name: min(prompts, curve) if variant.curve else prompts for variant in variants}
