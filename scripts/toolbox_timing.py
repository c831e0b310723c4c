"""How fast each variant is: all in one process, taken in turn, under the same settings.

Each round runs every variant once, in another order: what the machine does meanwhile meets all of
them alike. A UNet's time is one evaluation, for one branch of guidance; a picture's is text, all
steps and decoding, without loading. Several in a row count as their median: the first finds the
processor's cache full of the other variants' weights, which a process with one model never does.

Where a ratio of two is what is asked for, minutes between the two are too long on a machine that
others use as well: those two alone draw in turn, one picture each (`measure_duel`).
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from evaluate_demo import Task, held_out_tasks
from measure_compression import weights_of
from numpy.typing import NDArray
from toolbox_adherence import settings_of
from toolbox_variants import Variant

from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline
from sdvino.runtime.components import Components, unet_shapes

#: Evaluations of the UNet that one variant does in a row, each round; their median counts.
EVALUATIONS_AT_ONCE = 5
#: Pictures, likewise; each of another prompt, since a prompt's text is encoded once.
PICTURES_AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one variant, one a round."""

    weights: str
    steps: int
    guidance_scale: float
    #: One evaluation of the UNet: the median of some.
    evaluation: list[float] = field(default_factory=list)
    #: One picture: text, steps and decoding, without loading; the median of some.
    picture: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Duel:
    """Seconds of a picture by two variants that drew in turn; the same prompts for both."""

    #: Whose, by the weights of their folders.
    weights: list[str]
    slower: list[float]
    faster: list[float]


class _Runner:
    """One variant, loaded."""

    def __init__(self, variant: Variant, folder: Path, settings: RunSettings) -> None:
        self._pipe = StableDiffusionPipeline.from_pretrained(
            folder, settings=settings, profile=False
        )
        opened = self._pipe.folder
        self.times = Times(weights_of(folder), *settings_of(variant, folder))
        scale = opened.vae_scale_factor
        size = (opened.height // scale, opened.width // scale)
        # The graph that the pipeline makes for one branch, held by nobody else.
        self._unet = Components(opened, settings).unet(*size)
        self._inputs = random_inputs(unet_shapes(opened, *size))

    def warm_up(self, task: Task) -> None:
        """Load everything, and run it once."""
        self.evaluate(1)
        self.draw([task])

    def evaluate(self, times: int = EVALUATIONS_AT_ONCE) -> float:
        """Return the seconds of one evaluation of the UNet, the median of several."""
        spent = []
        for _ in range(times):
            began = time.perf_counter()
            self._unet.infer(self._inputs)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)

    def draw(self, tasks: Sequence[Task]) -> float:
        """Return the seconds of a picture: text, steps and decoding; the median of the tasks."""
        spent = []
        for task in tasks:
            timings = self._pipe(
                task.prompt.text,
                seed=task.seed,
                num_inference_steps=self.times.steps,
                guidance_scale=self.times.guidance_scale,
            ).timings
            spent.append(timings.total - timings.load)
        return statistics.median(spent)


def random_inputs(shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """Return inputs of a UNet, always the same: what they hold does not matter to its time."""
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return inputs | {"timestep": np.full(shapes["timestep"], 500.0, np.float32)}


def measure_times(
    folders: Mapping[Variant, Path], rounds: int, threads: int | None, say: Callable[[str], None]
) -> dict[str, Times]:
    """Return the times of every variant, by name, from ``rounds`` rounds over all of them.

    ``threads``: of the processor, for all; None: sdvino's own choice.
    """
    settings = run_settings(threads)
    runners = {}
    *tasks, first = held_out_tasks(rounds * PICTURES_AT_ONCE + 1)
    for variant, folder in folders.items():
        runner = runners[variant.name] = _Runner(variant, folder, settings)
        runner.warm_up(first)
    order = list(runners)
    shuffle = random.Random(0).shuffle
    began = time.monotonic()
    for done in range(1, rounds + 1):
        shuffle(order)
        drawn = tasks[(done - 1) * PICTURES_AT_ONCE : done * PICTURES_AT_ONCE]
        for name in order:
            runners[name].times.evaluation.append(runners[name].evaluate())
        for name in order:
            runners[name].times.picture.append(runners[name].draw(drawn))
        left = (time.monotonic() - began) / done * (rounds - done)
        say(f"times: round {done} of {rounds}, {left / 60:.1f} min left")
    return {name: runner.times for name, runner in runners.items()}


def measure_duel(
    slower: tuple[Variant, Path], faster: tuple[Variant, Path], pictures: int, threads: int | None
) -> Duel:
    """Let two variants draw ``pictures`` each in turn, nobody else being loaded.

    Who begins changes with every prompt, so that a machine that slows down is nobody's gain.
    """
    settings = run_settings(threads)
    *tasks, first = held_out_tasks(pictures + 1)
    pair = [_Runner(*one, settings) for one in (slower, faster)]
    for runner in pair:
        runner.warm_up(first)
    spent: tuple[list[float], list[float]] = ([], [])
    for index, task in enumerate(tasks):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            spent[which].append(pair[which].draw([task]))
    return Duel([one.times.weights for one in pair], *spent)


def run_settings(threads: int | None) -> RunSettings:
    """Return how everything here is run: in f32, whatever the machine would rather do."""
    return RunSettings(default=DeviceSettings(precision="f32", num_threads=threads, cache=False))


def times_faster(before: Sequence[float], after: Sequence[float]) -> float:
    """Return how many times ``after`` is as fast as ``before``, the median over their rounds."""
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return between what the median lies, to 95 %, whatever the distribution: two of the values.

    By the ranks that as many throws of a coin keep between them (Conover, Practical Nonparametric
    Statistics, 3.2, by the normal approximation).
    """
    ordered = sorted(values)
    rank = max(1, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return ordered[rank - 1], ordered[-rank]


def machine(threads: int | None) -> dict[str, Any]:
    """Return what the times depend on."""
    core = ov.Core()
    return {
        "processor": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": threads,
        "openvino": ov.get_version(),
        "system": platform.system(),
    }


def usable_cores() -> int | None:
    """Return how many of the machine's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
