"""docs/compression.md, written from what scripts/measure_toolbox.py found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measure_compression import interval
from toolbox_goals import (
    Goal,
    curve,
    faster_pictures,
    faster_unet,
    goals,
    pays_from,
    removed,
    title,
)
from toolbox_record import Findings
from toolbox_timing import EVALUATIONS_AT_ONCE, PICTURES_AT_ONCE
from toolbox_variants import INT8, REFERENCE, STUDENTS, Variant

from sdvino.train.prune import ZEROS_ARE_FREE_OF_NOTHING

TIME_PLOT, CURVE_PLOT, SHEET = (
    "compression-time.png",
    "compression-low-rank.png",
    "compression-pictures.png",
)
_HEAD = (
    "variant",
    "steps, guidance",
    "UNet: weights, million",
    "UNet: million multiply-adds",
    "MB",
    "UNet: ms, against int8",
    "picture: ms, against f32",
    "everything right",
    "difference to f32",
    "loses at most",
    "PSNR to f32: median, lowest tenth",
    "goal",
)


def report(findings: Findings, variants: Sequence[Variant], command: str) -> str:
    """Return the page; ``command`` is what measures everything on it but for its times."""
    lines = [
        "# The compression toolbox, measured",
        "",
        "Every pass on the bundled demo model by itself, and the stack. This page is written by",
        "",
        f"    {command}",
        "",
        "which measures everything that its record does not hold yet; `--only adherence`, `timing`,"
        " `real` (with `--real SOURCE`) and `report` do one part. Times want a quiet machine, the"
        " rest does not mind.",
        "",
        "## What is asked for",
        "",
        *_table(("", "found", ""), ((g.asked, g.found, g.word) for g in goals(findings))),
        "",
        "## Every variant",
        "",
        _how(findings),
        "",
        *_table(_HEAD, (_row(findings, one) for one in variants if one.name in findings.facts)),
        "",
        *_left(findings, variants),
        f"![adherence against the time of a picture]({TIME_PLOT})",
        "",
        f"Magnitude pruning: {ZEROS_ARE_FREE_OF_NOTHING}",
        "",
        *_low_rank(findings),
        "## Pictures",
        "",
        "The same prompts and seeds in every row; none of them was chosen by looking.",
        "",
        f"![pictures of the variants]({SHEET})",
        "",
        *_students(findings, variants),
        *_real(findings),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _how(findings: Findings) -> str:
    counts = [one.prompts for one in findings.adherence.values()]
    words = [
        f"Adherence: {max(counts, default=0)} prompts of colour-shape-background combinations that"
        " the model was never trained on, the same prompts and seeds for every variant"
    ]
    fewer: dict[int, list[str]] = {}
    for name, one in findings.adherence.items():
        if one.prompts < max(counts):
            fewer.setdefault(one.prompts, []).append(title(name))
    for count, titles in fewer.items():
        words.append(f" (the first {count} for: {'; '.join(titles)})")
    words.append(
        "; in brackets 95 % intervals, Wilson's for shares, Agresti and Min's for paired"
        " differences in points. `Loses at most` is the interval's far end. MB are the files of all"
        " components. Floats are computed in f32 everywhere. "
    )
    if findings.times and findings.machine:
        machine, rounds = findings.machine, len(next(iter(findings.times.values())).picture)
        threads = "sdvino's own number of" if machine["threads"] is None else machine["threads"]
        words.append(
            f"Times: medians of {rounds} rounds in one process, every variant in turn in each;"
            f" ratios are medians over the rounds. {machine['processor']},"
            f" {machine['usable_cores']} of {machine['cores']} cores, {threads} threads, OpenVINO"
            f" {machine['openvino']}. A UNet's time is one evaluation, the median of"
            f" {EVALUATIONS_AT_ONCE} in a row; a picture's is text, all steps and decoding, the"
            f" median of {PICTURES_AT_ONCE} in a row."
        )
    if findings.duels:
        drawn = len(next(iter(findings.duels.values())).faster)
        words.append(
            " What is asked of the stack's time is measured beside the other one alone:"
            f" {drawn} pictures each, drawn in turn; the median of their ratios, with its 95 %"
            " interval."
        )
    return "".join(words)


def _row(findings: Findings, one: Variant) -> tuple[str, ...]:
    facts, drawn = findings.facts[one.name], findings.adherence.get(one.name)
    times = findings.times.get(one.name)
    source = drawn if drawn is not None else times
    steps = (one.steps, one.guidance_scale)
    if source is not None:
        steps = (source.steps, source.guidance_scale)
    weights = f"{facts.parameters / 1e6:.2f}"
    if facts.nonzero < 0.99 * facts.parameters:
        weights += f", {1 - facts.nonzero / facts.parameters:.0%} zeros"
    operations = f"{facts.operations / 1e6:.0f}"
    if one.name != REFERENCE and removed(findings, one.name) > 0.005:
        operations += f" ({-removed(findings, one.name):+.1%})"
    cells = [one.title, f"{steps[0]}, {steps[1]:g}", weights, operations]
    cells.append(f"{facts.bytes / 1e6:.1f}")
    ratios = (faster_unet(findings, INT8, one.name), faster_pictures(findings, REFERENCE, one.name))
    spent = (None, None) if times is None else (times.evaluation, times.picture)
    for seconds, ratio in zip(spent, ratios, strict=True):
        if seconds is None:
            cells.append("")
        else:
            against = "" if ratio is None else f" ({ratio:.2f} x)"
            cells.append(f"{1e3 * statistics.median(seconds):.1f}{against}")
    if drawn is None:
        return (*cells, *[""] * (len(_HEAD) - len(cells)))
    cells.append(interval(drawn.right))
    if drawn.difference is None:
        cells += ["", ""]
    else:
        cells += [interval(drawn.difference, points=True), f"{drawn.lost:.2f} points"]
    alike = drawn.psnr is not None and drawn.psnr_tenth is not None
    cells.append(f"{drawn.psnr:.1f} dB, {drawn.psnr_tenth:.1f} dB" if alike else "")
    met = one.points is not None and drawn.lost <= one.points
    cells.append("" if one.points is None else f"{one.points:g} points: {_word(met)}")
    return tuple(cells)


def _left(findings: Findings, variants: Sequence[Variant]) -> Iterator[str]:
    titles = [one.title for one in variants if one.name not in findings.facts]
    if titles:
        yield from (f"Not measured: {'; '.join(titles)}.", "")


def _low_rank(findings: Findings) -> Iterator[str]:
    yield from ("## Low rank: where it pays", "")
    points = curve(findings)
    if not points:
        yield from ("Not measured.", "")
        return
    rows = []
    for point in points:
        drawn = findings.adherence.get(point.name)
        rows.append(
            (
                f"{point.weights:.0%}",
                f"{point.rank:.0%}",
                f"{point.operations:.0%}",
                f"{1e3 * point.seconds:.2f}",
                f"{point.faster:.2f} x",
                "" if drawn is None else interval(drawn.right),
            )
        )
    head = (
        "weights left",
        "rank left, median of the layers",
        "operations left",
        "UNet, ms",
        "as fast as the whole UNet in f32",
        "everything right, no training",
    )
    yield from _table(head, rows)
    start = pays_from(points)
    yield ""
    if start is None:
        yield (
            "Two thin layers in the place of one move more memory and fill vector units worse: on"
            " this machine the demo's UNet is not faster at any of these points."
        )
    else:
        yield (
            f"On this machine it starts to pay at {start.weights:.0%} of the weights, where"
            f" {start.operations:.0%} of the operations are left: above, what two thin layers in"
            " the place of one cost is more than what they save."
        )
    yield from ("", f"![low rank: size, time and adherence]({CURVE_PLOT})", "")


def _students(findings: Findings, variants: Sequence[Variant]) -> Iterator[str]:
    known = {one.student for one in variants if one.name in findings.facts}
    left = {one.student for one in variants if one.student} - known
    for name in sorted(left):
        what = STUDENTS.get(name, "a source of one's own")
        yield f"Not measured: `{name}` ({what}); give it with `--student {name}=FOLDER`."
    if left:
        yield ""


def _real(findings: Findings) -> Iterator[str]:
    yield from ("## At Stable Diffusion 1.5's size", "")
    real = findings.real
    if not real:
        yield "Not measured; `--only real --real SOURCE` does, SOURCE a model of that layout."
        return
    yield (
        f"{real['what']}, {real['machine']['usable_cores']} of {real['machine']['cores']} cores."
        " The weights are random: which of them go means nothing, only the time and memory that it"
        " takes, and the speed of what is left. Memory is the peak of all processes together."
    )
    yield ""
    rows = (
        (
            entry["what"],
            f"{entry['cpu_seconds'] / 60:.0f} min",
            f"{entry['peak_bytes'] / 1e9:.1f} GB",
            _percent(entry, "operations_left"),
            _percent(entry, "parameters_left"),
            _percent(entry, "bytes_left"),
        )
        for entry in real.get("passes", {}).values()
    )
    head = ("pass", "processor time", "peak memory", "operations left", "weights left")
    yield from _table((*head, "bytes left"), rows)
    times = real.get("times", {})
    if not times:
        return
    yield ""
    yield (
        f"One evaluation of the UNet at {real['side']} x {real['side']}, medians of"
        f" {len(next(iter(times.values()))['seconds'])} rounds, in turn:"
    )
    yield ""
    yield from _table(
        ("UNet", "s", "multiply-adds, billion", "MB"),
        (
            (
                entry["what"],
                f"{statistics.median(entry['seconds']):.2f}",
                f"{entry['operations'] / 1e9:.0f}",
                f"{entry['bytes'] / 1e6:.0f}",
            )
            for entry in times.values()
        ),
    )


def _percent(entry: Mapping[str, Any], key: str) -> str:
    return f"{entry[key]:.1%}" if key in entry else ""


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]
) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _word(met: bool) -> str:
    return Goal("", "", met).word
