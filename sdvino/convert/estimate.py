"""What a conversion will need (disk, memory, time), checked before it starts; how far it is."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdvino.compress.component_recipe import CALIBRATED
from sdvino.compress.stepwise import PART_BYTES
from sdvino.convert.request import WorkPlan
from sdvino.convert.steps import Progress, Step
from sdvino.errors import OutputError, RequestError
from sdvino.inputs.shown import gigabytes
from sdvino.runtime.memory import MemoryStatus, memory_status

_log = logging.getLogger("sdvino")

# Peaks of the worker processes, resident, mapped files included: libraries alone, and for each byte
# of half-precision weights. `scripts/bench_convert.py` prints them beside what is measured.
_EXPORT = (150_000_000, 1.05)
# optimum-intel's exporter holds a module in float32, and the graph that is traced of it.
_TRACE = (1_200_000_000, 4.0)
_WEIGHTS = (850_000_000, 0.4)
# Of what is calibrated only a part is worked on at a time: less where it is only evaluated. For
# each byte of weights and each pixel of the latents: what the whole would take.
_WHOLE_WEIGHTS, _WHOLE_PIXEL = 4.0, 1_000_000
_EVALUATED_SHARE = 0.3
_CALIBRATE = (500_000_000, 1.0)
# The weights of a part, and in the end those of the whole in 8 bits.
_QUANTIZE = (820_000_000, 0.55)
# Bytes that flow between the parts of the UNet that is evaluated, for each pixel of the latents of
# a trajectory: its skips.
_FLOW = 7_000
# Bytes of an evaluation's statistics for each byte of the UNet's weights: three numbers a channel.
_STATISTICS = 0.0016
# A guess: float32 in torch is twice half precision, beside it activations and factors.
_PASS = (1_200_000_000, 3.2)
# Teacher, student, their average, gradients and AdamW's two moments; beside them activations.
_LEARNING = (1_500_000_000, 15.0)
_PARENT = 100_000_000
# Bytes of a component for each byte of its half-precision weights.
_COMPRESSED_SIZE = 0.55
# A checkpoint has the student, its average and the moments in float32; and there may be two.
_CHECKPOINT = 16.0
_SCRATCH = 50_000_000
#: More of the machine's memory than this is not there, whatever is swapped out.
_USABLE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class StepNeeds:
    """What one step takes."""

    step: Step
    #: What is done to the component: export, fp16, int8 ...
    what: str
    seconds: float
    #: Peak memory of the step's process, and this one's.
    memory: int
    #: Bytes that stay on the disk until the conversion ends.
    disk: int
    #: Bytes on the disk while the step runs, beside those.
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What the steps that are left take, one after the other."""

    steps: tuple[StepNeeds, ...]

    @property
    def memory(self) -> int:
        """Return the peak memory, in bytes: one step runs at a time."""
        return max((needs.memory for needs in self.steps), default=0)

    @property
    def disk(self) -> int:
        """Return the bytes on the target's disk while the model is made."""
        scratch = max((needs.scratch for needs in self.steps), default=0)
        return sum(needs.disk for needs in self.steps) + scratch + _SCRATCH

    @property
    def seconds(self) -> float:
        """Return the expected time on a small laptop."""
        return sum(needs.seconds for needs in self.steps)


def work_out(steps: Sequence[Step], plan: WorkPlan) -> Needs:
    """Return what ``steps`` will take. Nothing is loaded for it."""
    return Needs(tuple(_needs_of(step, plan) for step in steps))


def check_needs(needs: Needs, folder: Path, status: MemoryStatus | None = None) -> None:
    """Raise OutputError when the disk of ``folder`` is too small, RequestError when memory is.

    When the memory would be enough with other programs closed, that is said in the log.
    """
    free = shutil.disk_usage(folder).free
    if free < needs.disk:
        raise OutputError(
            f"Converting needs {gigabytes(needs.disk)} on the disk of the target and"
            f" {gigabytes(free)} are free; free some space or choose another folder."
        )
    status = memory_status() if status is None else status
    if status.total is not None and needs.memory > status.total * _USABLE_SHARE:
        raise RequestError(
            f"This conversion needs about {gigabytes(needs.memory)} of memory and the machine has"
            f" {gigabytes(status.total)}; choose a milder --recipe, such as int8-weights or fp16."
        )
    if status.available is not None and needs.memory > status.available:
        _log.warning(
            "This needs about %s of memory and %s are free: it may be slow; close other programs.",
            gigabytes(needs.memory),
            gigabytes(status.available),
        )


def _needs_of(step: Step, plan: WorkPlan) -> StepNeeds:
    seconds = expected_seconds(step, plan)
    size = step.bytes
    if step.kind == "metadata":
        return StepNeeds(step, "tokenizer and configs", seconds, _peak(_EXPORT, 0), 10_000_000)
    if step.kind == "export":
        rates = _EXPORT if plan.request.exporter == "sdvino" else _TRACE
        return StepNeeds(step, "half precision", seconds, _peak(rates, size), size, step.scratch)
    if step.kind == "calibrate":
        return _calibrating(step, plan, seconds)
    if step.kind == "record":
        return StepNeeds(step, "record inputs", seconds, _peak(_PASS, size), 50_000_000)
    if step.kind == "pass":
        row = plan.recipe.passes[int(step.component.partition("-")[0]) - 1]
        what = f"{row.what} {row.component}"
        rates = _LEARNING if row.needs_origin else _PASS
        scratch = int(_CHECKPOINT * size) if row.needs_origin else 0
        return StepNeeds(step, what, seconds, _peak(rates, size), size + scratch)
    treatment = plan.recipe.treatment(step.component)
    if treatment == "fp16":
        return StepNeeds(step, treatment, seconds, _PARENT, size)
    disk = int(_COMPRESSED_SIZE * size)
    if step.component not in plan.quantized:
        return StepNeeds(step, treatment, seconds, _peak(_WEIGHTS, size), disk)
    return StepNeeds(step, treatment, seconds, _peak(_QUANTIZE, size), disk)


def _calibrating(step: Step, plan: WorkPlan, seconds: float) -> StepNeeds:
    """Return what recording inputs takes; the pictures are decoded in tiles."""
    calibration = plan.calibration
    part = int(_EVALUATED_SHARE * _part(plan, step.bytes))
    memory = _peak(_CALIBRATE, step.bytes) + part
    kept = int(calibration.evaluations * max(400_000, _STATISTICS * step.bytes))
    flow = len(calibration.prompts) * _pixels(plan) * _FLOW
    return StepNeeds(step, "measure activations", seconds, memory, kept, flow)


def _peak(rates: tuple[int, float], size: int) -> int:
    return int(_PARENT + rates[0] + rates[1] * size)


def _part(plan: WorkPlan, size: int) -> int:
    """Return the bytes that the largest part of a component takes, worked on in float32."""
    return min(PART_BYTES, int(_WHOLE_WEIGHTS * size + _WHOLE_PIXEL * _pixels(plan)))


def _pixels(plan: WorkPlan) -> int:
    _, height, width = plan.calibration.shape
    return height * width


# Seconds on a small laptop, per step and per gigabyte of half-precision weights; what matters most
# is their ratios.
_METADATA_SECONDS = 2.0
_EXPORT_SECONDS = (1.0, 6.0)
_COPY_SECONDS = (0.1, 1.0)
_WEIGHTS_SECONDS = (2.0, 20.0)
_EVALUATION_SECONDS = (0.01, 3.0)
# NNCF, from statistics: nothing is evaluated any more.
_QUANTIZE_SECONDS = (3.0, 40.0)
# Loading a component in torch, and the evaluations of a pass in it.
_PASS_SECONDS = (10.0, 150.0)
_RECORDED = 40
# Local quantization looks at every weight, and compiles and runs the component for many layers.
_LOCAL_SECONDS = (60.0, 900.0)
# A step that says nothing is shown to go on, but never as done.
_LONGEST_GUESS = 0.9


def expected_seconds(step: Step, plan: WorkPlan) -> float:
    """Return the seconds that ``step`` is expected to take on a small laptop."""
    once = _cost(_EVALUATION_SECONDS, step.bytes)
    if step.kind == "metadata":
        return _METADATA_SECONDS
    if step.kind == "export":
        return _cost(_EXPORT_SECONDS, step.bytes)
    if step.kind == "calibrate":
        return plan.calibration.evaluations * once
    if step.kind == "record":
        return _METADATA_SECONDS + _RECORDED * once
    if step.kind == "pass":
        row = plan.recipe.passes[int(step.component.partition("-")[0]) - 1]
        return _cost(_PASS_SECONDS, step.bytes) + row.evaluations * once
    treatment = plan.recipe.treatment(step.component)
    if treatment == "fp16":
        return _cost(_COPY_SECONDS, step.bytes)
    if step.component not in plan.quantized:
        return _cost(_WEIGHTS_SECONDS, step.bytes)
    if not plan.recipe.component(step.component).quantizes_activations:
        return _cost(_LOCAL_SECONDS, step.bytes)
    samples = 0 if treatment in CALIBRATED else plan.calibration.unet_samples
    return _cost(_QUANTIZE_SECONDS, step.bytes) + samples * once


class Work:
    """Turns the progress of a step into the progress of the whole."""

    def __init__(self, steps: Sequence[Step], plan: WorkPlan, report: Progress) -> None:
        """``steps`` are those that are left to do, in order."""
        self._report = report
        self._seconds = {step.name: expected_seconds(step, plan) for step in steps}
        self._total = sum(self._seconds.values())
        self._step = ""
        self._said = self._shown = 0.0
        self._since = time.monotonic()

    def update(self, step: str, share: float) -> None:
        """Report that ``step`` is done to ``share``, 0 to 1."""
        self._step, self._said, self._since = step, share, time.monotonic()
        self._show(share)

    def tick(self) -> None:
        """Report that time passes: a step that says nothing goes on as fast as expected."""
        if self._step:
            passed = (time.monotonic() - self._since) / self._seconds[self._step]
            self._show(max(self._said, min(_LONGEST_GUESS, self._said + passed)))

    def _show(self, share: float) -> None:
        before = 0.0
        for name, seconds in self._seconds.items():
            if name == self._step:
                whole = (before + share * seconds) / self._total
                self._shown = max(self._shown, whole)
                self._report(name, self._shown)
                return
            before += seconds


def _cost(per: tuple[float, float], size: int) -> float:
    return per[0] + per[1] * size / 1e9
