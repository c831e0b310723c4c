"""report.md: the gate's verdict for people, with plots, in the converted folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from sdvino.compress.plots import draw_pictures, plot_layers, plot_timesteps
from sdvino.compress.verdict import Verdict
from sdvino.inputs.shown import markdown

REPORT_FILE = "report.md"
#: Sub-folder of the plots.
PLOTS = "report"
_MOST_LISTED = 40


def write_report(folder: Path, verdict: Verdict, *, name: str) -> Path:
    """Write report.md and its plots into ``folder``; returns the report's path.

    ``name`` is the model's. Without matplotlib there are no line and bar plots, and it says so.
    """
    plots = folder / PLOTS
    plots.mkdir(exist_ok=True)
    lines = [f"# {markdown(name)}: what compression cost the picture", "", _headline(verdict), ""]
    lines += _asked_and_made(verdict)
    lines += _components(verdict)
    lines += _pictures(verdict, plots)
    lines += _timesteps(verdict, plots)
    lines += _layers(verdict, plots)
    lines += _history(verdict)
    if not any(plots.iterdir()):
        plots.rmdir()
    path = folder / REPORT_FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _headline(verdict: Verdict) -> str:
    word = {True: "Passed", False: "**Failed**", None: "Not judged"}[verdict.passed]
    return f"{word}: {markdown(verdict.note)}." if verdict.note else f"{word}."


def _asked_and_made(verdict: Verdict) -> list[str]:
    lines = [
        f"- recipe asked for: {markdown(verdict.asked)}; in this folder:"
        f" {markdown(verdict.recipe.name)}"
    ]
    if verdict.plan is not None:
        what = (
            f"- {verdict.plan.pictures} pictures of {verdict.plan.steps} steps at guidance"
            f" {verdict.guidance_scale:g}, seeds from {verdict.first_seed}, on prompts that"
            " calibration did not see; both pipelines in sdvino's own runtime, CPU, f32"
        )
        lines.append(what if verdict.guidance_scale is not None else "")
    if verdict.denoising_error is not None:
        lines.append(
            f"- the uncompressed UNet misses noise put on its own latents by"
            f" {verdict.denoising_error:.0%} (near 100 %: it has learnt nothing)"
        )
    lines.append(f"- took {verdict.minutes:.1f} min")
    return [line for line in lines if line]


def _components(verdict: Verdict) -> list[str]:
    if verdict.comparison is None:
        return []
    limits = verdict.thresholds.components
    rows = (
        (name, f"{error:.2%}", f"{limits[name]:.0%}" if name in limits else "")
        for name, error in verdict.comparison.components.items()
    )
    return [
        *("", "## Components", "", "Relative error of the output for the same input.", ""),
        *_table(("component", "error", "limit"), rows),
    ]


def _pictures(verdict: Verdict, plots: Path) -> list[str]:
    comparison = verdict.comparison
    if comparison is None or not comparison.psnr:
        return []
    lines = ["", "## Pictures", ""]
    rows = []
    for name, values, limit, digits in (
        ("PSNR, dB", comparison.psnr, verdict.thresholds.psnr, 1),
        ("SSIM", comparison.ssim, verdict.thresholds.ssim, 3),
        ("PSNR of the decoder alone, dB", comparison.decoder_psnr, None, 1),
    ):
        if values:
            numbers = (statistics.median(values), min(values), max(values))
            shown = (f"{number:.{digits}f}" for number in numbers)
            rows.append((name, *shown, "" if limit is None else f"{limit:g}"))
    lines += _table(("same prompt and seed", "median", "least", "most", "limit"), rows)
    if verdict.float_pictures and comparison.pictures:
        count = draw_pictures(verdict.float_pictures, comparison.pictures, plots / "pictures.png")
        lines += ["", f"![Before, after, difference x 8]({PLOTS}/pictures.png)", ""]
        lines.append("Uncompressed above, compressed in the middle, 8 times the difference below:")
        lines.append("")
        for i in range(count):
            seed = f", seed {verdict.first_seed + i}" if verdict.first_seed is not None else ""
            lines.append(f"{i + 1}. {markdown(verdict.prompts[i])}{seed}")
    return lines


def _timesteps(verdict: Verdict, plots: Path) -> list[str]:
    if verdict.comparison is None or not verdict.comparison.timesteps:
        return []
    timesteps = verdict.comparison.timesteps
    lines = ["", "## Error by timestep", ""]
    lines += _plot(
        partial(plot_timesteps, timesteps),
        plots / "error_by_timestep.png",
        "Relative error of the UNet's prediction by timestep",
    )
    rows = (
        (
            f"{entry.timestep:.0f}",
            f"{entry.conditional:.2%}",
            "" if entry.unconditional is None else f"{entry.unconditional:.2%}",
        )
        for entry in timesteps
    )
    return [*lines, "", *_table(("timestep", "with the prompt", "without it"), rows)]


def _layers(verdict: Verdict, plots: Path) -> list[str]:
    lines: list[str] = []
    for sensitivity in verdict.sensitivity:
        floats = set(verdict.float_layers.get(sensitivity.component, ()))
        count = sum(set(layer.nodes) <= floats for layer in sensitivity.layers)
        lines += ["", f"## Error by layer: {sensitivity.component}", ""]
        lines += ["Relative error of the component's output with this layer alone compressed.", ""]
        lines += _plot(
            partial(plot_layers, sensitivity, float_count=count),
            plots / f"error_by_layer_{sensitivity.component}.png",
            f"Error by layer of the {sensitivity.component}",
        )
    return lines


def _history(verdict: Verdict) -> list[str]:
    if not verdict.history:
        return []
    lines = ["", "## What was done about failures", ""]
    for remedy in verdict.history:
        after = []
        if remedy.psnr is not None:
            after.append(f"median PSNR {remedy.psnr:.1f} dB")
        if remedy.error is not None:
            after.append(f"error {remedy.error:.2%}")
        if remedy.action == "float layers":
            what = f"{len(remedy.what)} layers of the {remedy.component} back to float"
        else:
            what = f"recipe {markdown(', '.join(remedy.what))}"
        lines.append(f"- {'; '.join(remedy.because)}: {what}. Then: {', '.join(after) or '-'}.")
        if remedy.action == "float layers":
            lines += [f"  - {markdown(layer)}" for layer in remedy.what[:_MOST_LISTED]]
            if len(remedy.what) > _MOST_LISTED:
                lines.append(f"  - and {len(remedy.what) - _MOST_LISTED} more, in sdvino.json")
    return lines


def _plot(draw: Callable[[Path], None], path: Path, alternative: str) -> list[str]:
    try:
        draw(path)
    except ImportError:
        return ["(The plot needs matplotlib, which is not installed.)"]
    return [f"![{alternative}]({path.parent.name}/{path.name})"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
