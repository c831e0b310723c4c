"""How far a conversion is: the share of the whole that each step of it is expected to take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sdvino.compress.component_recipe import CALIBRATED
from sdvino.convert.progress import Progress
from sdvino.convert.request import WorkPlan
from sdvino.convert.steps import Step

# Seconds on a small laptop, per step and per gigabyte of half-precision weights; what matters most
# is their ratios.
_FRAME = 2.0
_EXPORT = (1.0, 6.0)
_COPY = (0.1, 1.0)
_WEIGHTS = (2.0, 20.0)
_EVALUATION = (0.01, 3.0)
# NNCF, from statistics: nothing is evaluated any more.
_QUANTIZE = (3.0, 40.0)
# Loading a component in torch, and the evaluations of a pass in it.
_PASS = (10.0, 150.0)
_GATHERED = 40
# Local quantization looks at every weight, and compiles and runs the component for many layers.
_LOCAL = (60.0, 900.0)
# A step that says nothing is shown to go on, but never as done.
_LONGEST_GUESS = 0.9


def expected_seconds(step: Step, plan: WorkPlan) -> float:
    """Return the seconds that ``step`` is expected to take on a small laptop."""
    if step.kind == "frame":
        return _FRAME
    if step.kind == "export":
        return _cost(_EXPORT, step.bytes)
    if step.kind == "calibrate":
        return plan.calibration.evaluations * _cost(_EVALUATION, step.bytes)
    if step.kind == "gather":
        return _FRAME + _GATHERED * _cost(_EVALUATION, step.bytes)
    if step.kind == "pass":
        row = plan.recipe.passes[int(step.component.partition("-")[0]) - 1]
        return _cost(_PASS, step.bytes) + row.evaluations * _cost(_EVALUATION, step.bytes)
    treatment = plan.recipe.treatment(step.component)
    if treatment == "fp16":
        return _cost(_COPY, step.bytes)
    if step.component not in plan.quantized:
        return _cost(_WEIGHTS, step.bytes)
    if not plan.recipe.component(step.component).quantizes_activations:
        return _cost(_LOCAL, step.bytes)
    samples = 0 if treatment in CALIBRATED else plan.calibration.unet_samples
    return _cost(_QUANTIZE, step.bytes) + samples * _cost(_EVALUATION, step.bytes)


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
