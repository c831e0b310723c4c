"""Plots of the benchmarks, as small PNG files: through matplotlib's Figure and Agg canvas alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS: Mapping[str, str] = {
    "sdvino": "#d9662b",
    "default": "#1f6fb4",
    "best": "#6fa8d6",
    "torch": "#9a9a9a",
}
_DPI = 90


def plot_bars(
    panels: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], path: Path, *, label: str
) -> None:
    """Draw a panel of bars for each title: (name, group, value), the shortest is the best."""
    heights = [0.6 + 0.28 * len(bars) for _, bars in panels]
    figure = new_figure(7.2, 0.3 + sum(heights))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for one, (title, bars) in zip(axes, panels, strict=True):
        rows = range(len(bars))
        values = [value for _, _, value in bars]
        drawn = one.barh(rows, values, color=[_COLOURS[group] for _, group, _ in bars])
        one.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        one.set_yticks(list(rows), [name for name, _, _ in bars], fontsize=8)
        one.invert_yaxis()
        one.set_xlim(0, max(values) * 1.12)
        one.set_title(textwrap.fill(title, 88), fontsize=9, loc="left")
        plain(one)
    axes[-1].set_xlabel(label)
    figure.savefig(path, format="png")


def plot_growth(
    panels: Sequence[tuple[str, Sequence[tuple[float, float, float]], str]], path: Path
) -> None:
    """Draw what it costs to ask for more: for each axis (name, points of x, seconds, bytes; fit).

    Times above, memory below; both axes of the times are logarithmic, so that a power is a line.
    """
    figure = new_figure(3.3 * len(panels), 5.2)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (name, points, fit) in enumerate(panels):
        upper, lower = axes[0][column], axes[1][column]
        xs = [x for x, _, _ in points]
        upper.loglog(xs, [s for _, s, _ in points], "o-", color=_COLOURS["sdvino"], base=2)
        upper.set_title(fit, fontsize=9)
        lower.semilogx(xs, [b / 1e9 for _, _, b in points], "o-", color="#1f6fb4", base=2)
        upper.yaxis.set_major_formatter("{x:g}")
        lower.set_ylim(0, 1.1 * max(b for _, _, b in points) / 1e9)
        lower.set_xlabel(name)
        for one in (upper, lower):
            one.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)
            one.minorticks_off()
            plain(one)
    axes[0][0].set_ylabel("seconds, without loading")
    axes[1][0].set_ylabel("peak memory, GB")
    figure.savefig(path, format="png")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches that saves itself as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any) -> None:
    """Take the frame off ``axes`` and put a light grid behind what they show."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
