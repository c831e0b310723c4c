"""What a conversion will need: disk, memory and time, worked out and checked before it starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdvino.compress.stepwise import PART_BYTES
from sdvino.convert.request import WorkPlan
from sdvino.convert.steps import Step
from sdvino.convert.work import expected_seconds
from sdvino.errors import OutputError, RequestError
from sdvino.inputs.sizes import gigabytes
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
    if step.kind == "frame":
        return StepNeeds(step, "tokenizer and configs", seconds, _peak(_EXPORT, 0), 10_000_000)
    if step.kind == "export":
        rates = _EXPORT if plan.request.exporter == "sdvino" else _TRACE
        return StepNeeds(step, "half precision", seconds, _peak(rates, size), size, step.scratch)
    if step.kind == "calibrate":
        return _calibrating(step, plan, seconds)
    if step.kind == "gather":
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
