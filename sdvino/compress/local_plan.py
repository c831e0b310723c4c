"""Local quantization, the decision: each layer's coding under a budget of bytes.

A layer's candidates follow from the distribution of its weights; each has the error that rounding
does to the weights. What an error of the weights does to the component's output is measured, one
layer at a time. Together they are damages, and the knapsack of `sdvino.compress.allocation` spends
the bytes where they prevent most of it. Pure functions, so that a choice can be seen and tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdvino.compress.allocation import Option, allocate, least_bytes
from sdvino.compress.weight_coding import Coding, Distribution, Estimator
from sdvino.compress.weight_graph import HALF, WeightLayer
from sdvino.errors import RequestError

#: From any of these on a layer's tails are heavy, and clipping may pay even in 8 bits: excess
#: kurtosis, share of outliers (three times a normal distribution's), and how much further the
#: widest channel reaches than most.
HEAVY_KURTOSIS, HEAVY_OUTLIERS, HEAVY_SPREAD = 1.0, 2e-4, 3.0
GROUPS = (128, 64, 32)
#: What 8-bit activations go with: NNCF's own weights, which integer kernels take.
WITH_ACTIVATIONS = Coding(bits=8, granularity="channel", symmetric=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A coding that a layer may take, and what it does to the layer's weights."""

    #: None: half precision.
    coding: Coding | None
    bytes: int
    #: Squared error of the weights over their squares.
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What is known of a layer before the choice."""

    layer: WeightLayer
    distribution: Distribution
    candidates: tuple[Candidate, ...]
    #: Squared relative error of the component's output for one of the weights; 1 where it was not
    #: measured.
    effect: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What a layer takes, and why."""

    facts: LayerFacts
    taken: Candidate

    @property
    def damage(self) -> float:
        """Return the squared relative error of the output that this choice is held to cause."""
        return self.facts.effect * self.taken.error


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """The choices for one component."""

    component: str
    layers: tuple[LayerChoice, ...]
    #: Bytes of all its weights that the budget allows; what else is in the graph counts as half
    #: precision.
    budget: int
    #: Bytes of constants that no choice was made for.
    fixed: int
    #: Inputs that the effects were measured on; 0: not measured, every layer counts alike.
    measured_on: int

    @property
    def bytes(self) -> int:
        """Return the bytes of the component's constants."""
        return self.fixed + sum(choice.taken.bytes for choice in self.layers)

    @property
    def half_bytes(self) -> int:
        """Return the bytes of the same in half precision."""
        return self.fixed + sum(HALF * choice.facts.layer.size for choice in self.layers)

    @property
    def expected_error(self) -> float:
        """Return the relative error of the output that the choices are held to cause together."""
        return math.sqrt(sum(choice.damage for choice in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        return {
            "component": self.component,
            "budget": self.budget,
            "bytes": self.bytes,
            "half_precision_bytes": self.half_bytes,
            "expected_error": self.expected_error if self.measured_on else None,
            "measured_on": self.measured_on,
            "layers": [_row(choice) for choice in self.layers],
        }


def codings(
    layer: WeightLayer, found: Distribution, *, bits: int, activations: bool = False
) -> list[Coding]:
    """Return the codings that are worth trying for ``layer``, of ``bits`` (8, or 8 and 4).

    Heavy tails try clipped ranges as well. Four bits always do, and never share a scale over the
    tensor. ``activations``: 8 bits are for integer kernels, which take one scale for a channel;
    convolutions keep to them, as 4-bit ones would run on floats.
    """
    heavy = (
        found.kurtosis > HEAVY_KURTOSIS
        or found.outliers > HEAVY_OUTLIERS
        or found.spread > HEAVY_SPREAD
    )
    eight = [WITH_ACTIVATIONS] if activations else list(_eight_bits(heavy))
    four = [] if bits > 4 or (activations and layer.convolution) else list(_four_bits(heavy))
    return [coding for coding in (*eight, *four) if layer.takes(coding)]


def _eight_bits(heavy: bool) -> Iterator[Coding]:
    estimators: tuple[Estimator, ...] = ("min-max", "percentile", "mse") if heavy else ("min-max",)
    for estimator in estimators:
        yield Coding(bits=8, granularity="tensor", symmetric=True, estimator=estimator)
    for estimator in estimators:
        yield Coding(bits=8, granularity="channel", estimator=estimator)
    yield Coding(bits=8, granularity="channel", symmetric=True)
    yield Coding(bits=8, granularity="group", group_size=128)


def _four_bits(heavy: bool) -> Iterator[Coding]:
    channel: tuple[Estimator, ...] = ("min-max", "percentile", "mse") if heavy else ("mse",)
    for estimator in channel:
        yield Coding(bits=4, granularity="channel", estimator=estimator)
    for size in GROUPS:
        for kind in ("min-max", "mse"):
            estimator = "mse" if kind == "mse" else "min-max"
            yield Coding(bits=4, granularity="group", group_size=size, estimator=estimator)


def in_half(layer: WeightLayer) -> Candidate:
    """Return the layer as it is: half precision."""
    return Candidate(coding=None, bytes=HALF * layer.size, error=0.0)


def budget_bytes(budget: float, facts: Sequence[LayerFacts], fixed: int) -> int:
    """Return the bytes that a component's constants may take.

    ``budget`` up to 1 is a share of the layers' bytes in half precision, beside which ``fixed``
    bytes stay as they are; above 1 it is bytes, those included.
    """
    if budget > 1.0:
        return int(budget)
    return fixed + int(budget * sum(HALF * entry.layer.size for entry in facts))


def choose(
    component: str,
    facts: Sequence[LayerFacts],
    budget: float,
    *,
    fixed: int = 0,
    measured_on: int = 0,
) -> LocalPlan:
    """Return the choice of least damage within ``budget`` (see `budget_bytes`).

    Raises RequestError, with the least that would do, for a budget that nothing can meet.
    """
    allowed = budget_bytes(budget, facts, fixed)
    options = [
        [Option(candidate.bytes, entry.effect * candidate.error) for candidate in entry.candidates]
        for entry in facts
    ]
    least = least_bytes(options)
    if least > allowed - fixed:
        share = least / max(1, sum(HALF * entry.layer.size for entry in facts))
        # Rounded up: what is said must do.
        needed = f"{math.ceil(1000 * share) / 1000:g}" if budget <= 1.0 else f"{least + fixed}"
        raise RequestError(
            f"The budget of {component} is {budget:g}, and the least that its layers can take is"
            f" {needed}; give that or more, or allow 4 bits."
        )
    chosen = allocate(options, allowed - fixed)
    return LocalPlan(
        component=component,
        layers=tuple(
            LayerChoice(facts=entry, taken=entry.candidates[index])
            for entry, index in zip(facts, chosen, strict=True)
        ),
        budget=allowed,
        fixed=fixed,
        measured_on=measured_on,
    )


def effects_of(
    errors: Mapping[tuple[str, ...], float], rounded: Mapping[str, float]
) -> dict[str, float]:
    """Return each layer's effect from what was measured.

    ``errors``: layers that were rounded together -> relative error of the output; ``rounded``:
    layer -> squared error of its weights when that was measured. Errors are small, so that their
    squares add up and grow with those of the weights; layers of a group share by the latter.
    """
    effects: dict[str, float] = {}
    for names, error in errors.items():
        total = sum(rounded[name] for name in names)
        effect = error**2 / total if total > 0.0 else 0.0
        effects |= dict.fromkeys(names, effect)
    return effects


def _row(choice: LayerChoice) -> dict[str, Any]:
    layer, taken = choice.facts.layer, choice.taken
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "coding": None if taken.coding is None else asdict(taken.coding),
        "bytes": taken.bytes,
        "weight_error": math.sqrt(taken.error),
        "effect": choice.facts.effect,
        "output_error": math.sqrt(choice.damage),
        **asdict(choice.facts.distribution),
    }
