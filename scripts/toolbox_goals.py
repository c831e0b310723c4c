"""What the toolbox is asked for, and whether what was found meets it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolbox_models import Facts
from toolbox_real import PASSES, QUANTIZATIONS
from toolbox_record import Findings
from toolbox_timing import median_interval, times_faster
from toolbox_variants import BUDGETS, DUELS, FEW_STEPS, PAIRS, REFERENCE, STACK, VARIANTS, Variant

#: Share of the UNet's operations that structured pruning has to take out.
CUT = 0.30
REAL_FASTER = 1.35
REAL_BYTES = 10e9
STACK_BYTES = 1 / 3
#: A time shorter by less than this share is none.
_NOISE = 0.02


@dataclass(frozen=True, slots=True)
class Goal:
    """One thing that is asked for."""

    asked: str
    found: str
    #: None: not measured yet.
    met: bool | None

    @property
    def word(self) -> str:
        """Return the verdict."""
        return "not measured" if self.met is None else "met" if self.met else "missed"


def goals(findings: Findings) -> list[Goal]:
    """Return every goal with what was found."""
    return [
        *(_pair(findings, local, other) for local, other in PAIRS.items()),
        _points(findings, "local-int4", "4-bit local: adherence within 3 points of f32"),
        _lean(findings),
        *_real(findings),
        _points(findings, "steps", "4 steps, guidance folded in: within 4 points of 20 steps"),
        _low_rank(findings),
        *_stack(findings),
    ]


def _pair(findings: Findings, local: str, other: str) -> Goal:
    asked = f"{title(local)}: better than by one scheme"
    one, whole = (findings.adherence.get(name) for name in (local, other))
    if one is None or whole is None or one.versus is None or one.psnr is None:
        return Goal(asked, "", None)
    assert whole.psnr is not None
    facts = [findings.facts[name].unet_bytes / 1e6 for name in (local, other)]
    words = (
        f"PSNR {one.psnr - whole.psnr:+.1f} dB, adherence {100 * one.versus.value:+.2f} points"
        f" [{100 * one.versus.low:+.2f}, {100 * one.versus.high:+.2f}], at {facts[0]:.2f} and"
        f" {facts[1]:.2f} MB"
    )
    return Goal(asked, words, one.psnr > whole.psnr and one.versus.high > 0.0)


def _points(findings: Findings, name: str, asked: str) -> Goal:
    found = findings.adherence.get(name)
    if found is None:
        return Goal(asked, "", None)
    allowed = variant(name).points
    assert allowed is not None
    return Goal(asked, f"loses at most {found.lost:.2f} points", found.lost <= allowed)


def _lean(findings: Findings) -> Goal:
    asked = f"{CUT:.0%} of the UNet's operations pruned, recovered: adherence within 3 points"
    found = _points(findings, "lean-recovered", asked)
    if found.met is None:
        return found
    cut = removed(findings, "lean-recovered")
    return Goal(asked, f"{cut:.1%} fewer operations, {found.found}", found.met and cut >= CUT)


def removed(findings: Findings, name: str) -> float:
    """Return the share of the UNet's operations that are gone."""
    return 1.0 - findings.facts[name].operations / findings.facts[REFERENCE].operations


def _real(findings: Findings) -> Iterator[Goal]:
    real = findings.real
    asked = f"the same cut at Stable Diffusion 1.5's size: {REAL_FASTER} x faster than int8 alone"
    times = real.get("times", {})
    if "int8" in times and "lean-int8" in times:
        ratio = times_faster(times["int8"]["seconds"], times["lean-int8"]["seconds"])
        cut = 1.0 - times["lean-int8"]["operations"] / times["int8"]["operations"]
        words = f"{ratio:.2f} x with {cut:.1%} fewer operations"
        yield Goal(asked, words, ratio >= REAL_FASTER and cut >= CUT)
    else:
        yield Goal(asked, "", None)
    passes = real.get("passes", {})
    asked = f"every pass at that size within {REAL_BYTES / 1e9:g} GB of memory"
    if not passes:
        yield Goal(asked, "", None)
        return
    worst = max(passes, key=lambda name: float(passes[name]["peak_bytes"]))
    peak = passes[worst]["peak_bytes"]
    left = [name for name in (*PASSES, *QUANTIZATIONS) if name not in passes]
    words = f"at most {peak / 1e9:.1f} GB ({worst})"
    if left and peak <= REAL_BYTES:  # what is left may take more
        yield Goal(asked, f"{words} so far; left: {', '.join(left)}", None)
    else:
        yield Goal(asked, words, peak <= REAL_BYTES)


def _low_rank(findings: Findings) -> Goal:
    asked = "low rank: where it starts to pay on this machine"
    points = curve(findings)
    if len(points) < 2:
        return Goal(asked, "", None)
    start = pays_from(points)
    if start is None:
        least = min(points, key=lambda point: point.weights)
        words = f"not down to {least.weights:.0%} of the weights: {least.faster:.2f} x as fast"
    else:
        words = f"at {start.weights:.0%} of the weights and below: {start.faster:.2f} x as fast"
    return Goal(asked, words, True if len(points) == len(BUDGETS) else None)


def _stack(findings: Findings) -> Iterator[Goal]:
    titles = {
        REFERENCE: "f32 at 20 steps with guidance",
        FEW_STEPS: "undistilled f32 at 4 steps and guidance 1",
    }
    for other, factor in DUELS.items():
        asked = f"the stack: {factor:g} x faster per picture than {titles[other]}"
        duel = findings.duels.get(other)
        if duel is None:
            yield Goal(asked, "", None)
            continue
        ratio = times_faster(duel.slower, duel.faster)
        low, high = median_interval([a / b for a, b in zip(duel.slower, duel.faster, strict=True)])
        found = f"{ratio:.2f} x [{low:.2f}, {high:.2f}]"
        yield Goal(asked, found, ratio >= factor)
    asked = "the stack: a third of the bytes or less"
    facts = findings.facts.get(STACK)
    if facts is None:
        yield Goal(asked, "", None)
    else:
        whole = findings.facts[REFERENCE]
        words = (
            f"{facts.bytes / 1e6:.1f} MB: {facts.bytes / whole.float_bytes:.1%} of the"
            f" {whole.float_bytes / 1e6:.1f} MB in f32, {facts.bytes / whole.bytes:.1%} of the"
            f" {whole.bytes / 1e6:.1f} MB in half precision"
        )
        yield Goal(asked, words, facts.bytes <= STACK_BYTES * whole.float_bytes)
    yield _points(findings, STACK, "the stack: adherence within 5 points")


def faster_pictures(findings: Findings, before: str, after: str) -> float | None:
    """Return how many times faster a picture is; None where one of the two was not timed."""
    if before not in findings.times or after not in findings.times:
        return None
    return times_faster(findings.times[before].picture, findings.times[after].picture)


def faster_unet(findings: Findings, before: str, after: str) -> float | None:
    """Return how many times faster the UNet is; None where one of the two was not timed."""
    if before not in findings.times or after not in findings.times:
        return None
    return times_faster(findings.times[before].evaluation, findings.times[after].evaluation)


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of low rank, against the float model."""

    name: str
    #: Shares of the UNet's weights, of its operations, of the rank (median over its layers).
    weights: float
    operations: float
    rank: float
    #: How many times as fast the UNet is, and the seconds of one evaluation.
    faster: float
    seconds: float


def curve(findings: Findings) -> list[Point]:
    """Return what was timed of low rank in floats, the most weights first."""
    whole = findings.facts.get(REFERENCE)
    points = []
    for one in VARIANTS:
        faster = faster_unet(findings, REFERENCE, one.name)
        facts: Facts | None = findings.facts.get(one.name)
        if not one.name.startswith("low-rank") or one.name.endswith("int8"):
            continue
        if whole is None or facts is None or faster is None or facts.rank_share is None:
            continue
        points.append(
            Point(
                name=one.name,
                weights=facts.parameters / whole.parameters,
                operations=facts.operations / whole.operations,
                rank=facts.rank_share,
                faster=faster,
                seconds=statistics.median(findings.times[one.name].evaluation),
            )
        )
    return sorted(points, key=lambda point: -point.weights)


def pays_from(points: Sequence[Point]) -> Point | None:
    """Return the point from which on, down to fewer weights, all are faster than the whole UNet."""
    start = None
    for point in sorted(points, key=lambda point: point.weights):
        if point.faster < 1.0 + _NOISE:
            break
        start = point
    return start


def variant(name: str) -> Variant:
    """Return the variant of that name."""
    return next(one for one in VARIANTS if one.name == name)


def title(name: str) -> str:
    """Return what the variant of that name is called."""
    return variant(name).title
