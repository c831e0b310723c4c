"""How far a conversion is: the share of the whole that each part of it is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.recipes import Recipe

#: Called with what is being done and the share of the whole conversion done, 0 to 1.
Progress = Callable[[str, float], None]

# Seconds on a small laptop, per component and per gigabyte of half-precision weights; only their
# ratios matter.
_EXPORT = (4.0, 30.0)
_WEIGHTS = (1.0, 20.0)
_EVALUATION = (0.01, 3.0)
# NNCF goes over the calibration inputs twice, with statistics at every layer.
_QUANTIZE_PASSES = 3.0
# UNet evaluations that the gate is about.
_GATE_PASSES = 300.0


def silent(what: str, share: float) -> None:
    """Show nothing."""


class Work:
    """Turns the progress of a part into the progress of the whole."""

    def __init__(
        self,
        components: Mapping[str, int],
        recipe: Recipe,
        plan: CalibrationPlan,
        report: Progress,
        *,
        gated: bool = False,
    ) -> None:
        """``components`` gives the bytes of each component's weights, in order."""
        self._report = report
        self._seconds: dict[str, float] = {}
        for name, size in components.items():
            self._seconds[f"export {name}"] = _cost(_EXPORT, size)
        if any(recipe.component(name).calibrated for name in components):
            evaluation = _cost(_EVALUATION, components.get("unet", 0))
            self._seconds["calibrate"] = plan.evaluations * evaluation
        for name, size in components.items():
            if recipe.treatment(name) == "fp16":
                continue
            if not recipe.component(name).calibrated:
                self._seconds[f"compress {name}"] = _cost(_WEIGHTS, size)
            else:
                samples = plan.unet_samples if name == "unet" else len(plan.prompts)
                seconds = _QUANTIZE_PASSES * samples * _cost(_EVALUATION, size)
                self._seconds[f"compress {name}"] = 1.0 + seconds
        if gated:
            self._seconds["gate"] = _GATE_PASSES * _cost(_EVALUATION, components.get("unet", 0))
        self._total = sum(self._seconds.values())

    def update(self, part: str, share: float) -> None:
        """Report that ``part`` is done to ``share``, 0 to 1."""
        before = 0.0
        for name, seconds in self._seconds.items():
            if name == part:
                self._report(part, (before + share * seconds) / self._total)
                return
            before += seconds


def _cost(per: tuple[float, float], size: int) -> float:
    return per[0] + per[1] * size / 1e9
