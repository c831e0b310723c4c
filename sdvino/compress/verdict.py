"""What the gate found: everything measured, what it was held to, and what was done about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `sdvino info` reads verdicts and needs nothing that compares models
    import numpy as np
    from numpy.typing import NDArray

    from sdvino.compress.compare import Comparison
    from sdvino.compress.recipes import Recipe
    from sdvino.compress.sensitivity import Sensitivity
    from sdvino.compress.thresholds import GatePlan, Thresholds

#: Layers written to the manifest, of each component; the report draws the same ones.
_LISTED_LAYERS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One thing that was done because a threshold failed, and what it gave."""

    #: ``float layers`` or ``milder recipe``.
    action: str
    #: The component whose layers went back to float; empty for a recipe.
    component: str = ""
    #: The layers, or the recipe's name.
    what: tuple[str, ...]
    #: The failures that it answers.
    because: tuple[str, ...]
    #: Median PSNR of the pictures afterwards, dB; None where pictures are not compared.
    psnr: float | None = None
    #: Relative error of the component afterwards.
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The gate's answer; `to_dict` goes into sdvino.json as ``quality``."""

    #: None: nothing was judged, and ``note`` says why.
    passed: bool | None
    #: The recipe that the folder now has; with layers back in float, or milder than asked for.
    recipe: Recipe
    asked: str
    thresholds: Thresholds
    #: In one sentence: what the outcome is.
    note: str
    #: What failed, one sentence each.
    failures: tuple[str, ...] = ()
    comparison: Comparison | None = None
    #: False: the weights draw nothing, and components alone are judged.
    trained: bool | None = None
    denoising_error: float | None = None
    plan: GatePlan | None = None
    prompts: tuple[str, ...] = ()
    first_seed: int | None = None
    guidance_scale: float | None = None
    history: tuple[Remedy, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    #: Component to its layers that went back to float.
    float_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: What comparing was expected to take, and what everything took.
    estimated_minutes: float | None = None
    minutes: float = 0.0
    #: Float pictures, uint8 [H, W, 3], beside those of `comparison`.
    float_pictures: tuple[NDArray[np.uint8], ...] = field(default=(), compare=False, repr=False)

    @property
    def fell_back(self) -> bool:
        """Return whether the recipe is a milder one than was asked for."""
        return self.recipe.name != self.asked

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON knows values: no NaN or infinity, no arrays, no paths."""
        comparison = self.comparison
        measured = None
        if comparison is not None:
            measured = {
                "components": dict(comparison.components),
                "timesteps": [asdict(entry) for entry in comparison.timesteps],
                "psnr": list(comparison.psnr),
                "median_psnr": median(comparison.psnr),
                "ssim": list(comparison.ssim),
                "median_ssim": median(comparison.ssim),
                "decoder_psnr": list(comparison.decoder_psnr),
            }
        value = {
            "passed": self.passed,
            "note": self.note,
            "asked": self.asked,
            "recipe": self.recipe.name,
            "fell_back": self.fell_back,
            "failures": list(self.failures),
            "thresholds": {
                "psnr": self.thresholds.psnr,
                "ssim": self.thresholds.ssim,
                "components": dict(self.thresholds.components),
            },
            "measured": measured,
            "trained": self.trained,
            "denoising_error": self.denoising_error,
            "plan": None if self.plan is None else asdict(self.plan),
            "prompts": list(self.prompts),
            "first_seed": self.first_seed,
            "guidance_scale": self.guidance_scale,
            "history": [asdict(entry) for entry in self.history],
            "sensitivity": {
                entry.component: [
                    {"name": layer.name, "error": layer.error, "layers": len(layer.nodes)}
                    for layer in entry.layers[:_LISTED_LAYERS]
                ]
                for entry in self.sensitivity
            },
            "float_layers": {name: list(layers) for name, layers in self.float_layers.items()},
            "estimated_minutes": self.estimated_minutes,
            "minutes": self.minutes,
        }
        plain: dict[str, Any] = _plain(value)
        return plain


def severities(comparison: Comparison, thresholds: Thresholds) -> dict[str, float]:
    """Return component -> error over its limit, the largest first."""
    shares = {
        name: comparison.components[name] / limit
        for name, limit in thresholds.components.items()
        if name in comparison.components and limit > 0
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def find_failures(
    comparison: Comparison, thresholds: Thresholds, *, pictures: bool
) -> tuple[str, ...]:
    """Return a sentence for each threshold that ``comparison`` misses."""
    failures = [
        f"the {name} is off by {comparison.components[name]:.1%} of its output"
        f" (limit {thresholds.components[name]:.1%})"
        for name, share in severities(comparison, thresholds).items()
        if not share <= 1.0
    ]
    for kind, values, limit, unit in (
        ("PSNR", comparison.psnr, thresholds.psnr, " dB"),
        ("SSIM", comparison.ssim, thresholds.ssim, ""),
    ):
        middle = median(values)
        if pictures and limit is not None and middle is not None and not middle >= limit:
            failures.append(
                f"the pictures' median {kind} is {middle:.4g}{unit} (limit {limit:.4g}{unit})"
            )
    return tuple(failures)


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def quality_line(quality: Mapping[str, Any]) -> str:
    """Return one line on a ``quality`` object of a manifest, whatever somebody wrote into it."""
    passed = quality.get("passed")
    parts = ["passed" if passed is True else "FAILED" if passed is False else "not judged"]
    measured = quality.get("measured")
    if isinstance(measured, Mapping) and quality.get("trained") is not False:
        for key, text in (("median_psnr", "median PSNR {:.1f} dB"), ("median_ssim", "SSIM {:.3f}")):
            value = measured.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                parts.append(text.format(value))
    note = quality.get("note")
    if isinstance(note, str) and note:
        parts.append(" ".join(note.split())[:300])
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    """Return ``value`` with numbers that JSON has no word for as None, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):  # NumPy's float64 is one
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_blame(comparison: Comparison, thresholds: Thresholds) -> str:
    """Return the component to mend: the one furthest over its limit, or that spoils pictures."""
    shares = severities(comparison, thresholds)
    worst = next(iter(shares), "unet")
    if shares and not shares[worst] <= 1.0:
        return worst
    decoded, whole = median(comparison.decoder_psnr), median(comparison.psnr)
    # Squared errors add up: within 3 dB of the whole, the decoder makes half of it or more.
    if decoded is not None and whole is not None and decoded <= whole + 3.0:
        return "vae_decoder"
    drawing = {n: s for n, s in shares.items() if n == "unet" or n.startswith("text_encoder")}
    return max(drawing, key=lambda name: drawing[name], default="unet")


def share_to_reach(comparison: Comparison, thresholds: Thresholds, component: str) -> float:
    """Return the share of the component's present error that would just pass."""
    goal = 1.0
    limit, error = thresholds.components.get(component), comparison.components.get(component)
    if limit is not None and error is not None and error > limit:
        goal = min(goal, limit / error)
    decibels = median(comparison.psnr)
    if thresholds.psnr is not None and decibels is not None and decibels < thresholds.psnr:
        goal = min(goal, 10 ** ((decibels - thresholds.psnr) / 20))
    return goal if goal < 1.0 else 0.7  # SSIM alone
