"""The plots of docs/compression.md, and its sheet of pictures, as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_plots import new_figure, plain
from evaluate_demo import Share
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from toolbox_goals import curve
from toolbox_record import Findings
from toolbox_variants import REFERENCE, Variant

_COLOURS: Mapping[str, str] = {
    "reference": "#444444",
    "quantization": "#1f6fb4",
    "pruning": "#d9662b",
    "low rank": "#7a9a3a",
    "steps": "#8457a8",
    "stack": "#c0282d",
    "students": "#9a9a9a",
}
_COLUMNS, _GAP, _LABEL = 8, 4, 250
_TICKS = (20, 50, 100, 200, 500, 1000, 2000)


def plot_adherence(findings: Findings, variants: Sequence[Variant], path: Path) -> None:
    """Draw adherence, with its interval, against the time of a picture."""
    figure = new_figure(8.4, 5.4)
    axes = figure.subplots()
    known = findings.adherence.keys() & findings.times.keys()
    places = []
    # Those with a goal, or on the sheet of pictures, have their names first.
    for one in sorted(variants, key=lambda v: (v.points is None, not v.shown)):
        if one.name not in known:
            continue
        share = findings.adherence[one.name].right
        x, y = 1e3 * statistics.median(findings.times[one.name].picture), 100 * share.value
        colour = _COLOURS[one.group]
        axes.errorbar([x], [y], yerr=_bars([share]), fmt="o", color=colour, ms=4)
        places.append((one.name, (x, y), colour))
    for group, colour in _COLOURS.items():
        if any(one.group == group and one.name in known for one in variants):
            axes.plot([], [], "o", color=colour, ms=4, label=group)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.1)
    axes.set_xlabel("a picture, ms (logarithmic)")
    axes.set_ylabel("everything right, %")
    axes.set_title("What each variant draws, and how long it takes", fontsize=10, loc="left")
    plain(axes)
    if places:
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        _name(figure, axes, places)
    figure.savefig(path, format="png")


def _name(figure: Any, axes: Any, places: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Write the names of points beside them; what finds no room is in the table alone."""
    figure.draw_without_rendering()
    taken = [
        Bbox.from_bounds(x - 3, y - 3, 6, 6)
        for x, y in axes.transData.transform([point for _, point, _ in places])
    ]
    frame = axes.get_window_extent()
    for name, point, colour in places:
        for offset, side in (
            ((5, 4), "left"),
            ((5, -10), "left"),
            ((-5, 4), "right"),
            ((-5, -10), "right"),
        ):
            text = axes.annotate(
                name,
                point,
                xytext=offset,
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=6.5,
                color=colour,
            )
            box = text.get_window_extent()
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def plot_curve(findings: Findings, path: Path) -> None:
    """Draw size, time and adherence of low rank over the weights that are left."""
    points = curve(findings)
    figure = new_figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    xs = [100 * point.weights for point in points]
    left.plot(xs, [100 * p.operations for p in points], "s--", color="#999999", label="operations")
    left.plot(xs, [100 * p.rank for p in points], "^:", color="#7a9a3a", label="rank (median)")
    left.plot(xs, [100 / p.faster for p in points], "o-", color="#d9662b", label="time of the UNet")
    left.axhline(100, color="#444444", linewidth=0.8)
    left.set_ylabel("% of the whole UNet in f32")
    left.legend(frameon=False, fontsize=8)
    drawn = [(x, findings.adherence.get(p.name)) for x, p in zip(xs, points, strict=True)]
    shares = [(x, found.right) for x, found in drawn if found is not None]
    values = [100 * share.value for _, share in shares]
    right.errorbar(
        [x for x, _ in shares],
        values,
        yerr=_bars([share for _, share in shares]),
        fmt="o-",
        color="#1f6fb4",
        ms=4,
    )
    whole = findings.adherence.get(REFERENCE)
    if whole is not None:
        right.axhline(100 * whole.right.value, color="#444444", linewidth=0.8)
    right.set_ylabel("everything right, %, no training")
    for axes in (left, right):
        axes.set_xlabel("weights left, %")
        axes.invert_xaxis()
        plain(axes)
    figure.savefig(path, format="png")


def _bars(shares: Sequence[Share]) -> NDArray[np.float64]:
    """Return the interval around each share as matplotlib wants it, percent [2, n]."""
    pairs = [(share.value - share.low, share.high - share.value) for share in shares]
    bars: NDArray[np.float64] = 100 * np.array(pairs, np.float64).reshape(-1, 2).T
    return bars.clip(0.0)


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], captions: Sequence[str], path: Path
) -> None:
    """Put pictures, uint8 [H, W, 3], in a row for each variant, its name before them."""
    side = rows[0][1][0].shape[0]
    step, head = side + _GAP, 40
    columns = min(_COLUMNS, len(rows[0][1]))
    size = (_LABEL + columns * step + _GAP, head + len(rows) * step + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions[:columns]):
        draw.multiline_text((_LABEL + column * step, 2), _wrapped(caption, 22), fill="black")
    for row, (label, pictures) in enumerate(rows):
        y = head + row * step
        draw.multiline_text((_GAP, y + side // 2 - 12), _wrapped(label, 38), fill="black")
        for column, picture in enumerate(pictures[:columns]):
            sheet.paste(Image.fromarray(picture), (_LABEL + column * step, y))
    sheet.quantize(128).save(path, "PNG", optimize=True)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])
