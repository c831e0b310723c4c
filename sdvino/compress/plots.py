"""The report's plots as small PNG files: errors by timestep and by layer, pictures side by side.

matplotlib is used through its Figure and the Agg canvas alone: no pyplot, no state of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.compare import TimestepError
from sdvino.compress.float_layers import short_name
from sdvino.compress.sensitivity import Sensitivity

if TYPE_CHECKING:
    from PIL import Image

#: Every file stays below this.
MAX_BYTES = 100_000
_DPI = 80
_COLOURS = ("#1f6fb4", "#d9662b")
_MOST_LAYERS, _MOST_PICTURES = 30, 6
_LONGEST_LABEL = 56
#: Side of a picture in the sheet, pixels, and the space around it.
_SIDE, _GAP = 160, 4
#: The difference of two pictures is drawn this many times stronger, around grey.
_AMPLIFIED = 8


def plot_timesteps(timesteps: Sequence[TimestepError], path: Path) -> None:
    """Draw the relative error of the UNet's prediction over the timestep, both branches."""
    figure, axes = _figure(6.4, 3.4)
    times = [entry.timestep for entry in timesteps]
    branches: dict[str, list[float | None]] = {
        "with the prompt": [entry.conditional for entry in timesteps],
        "without it": [entry.unconditional for entry in timesteps],
    }
    for colour, (label, values) in zip(_COLOURS, branches.items(), strict=True):
        known = [(t, 100 * v) for t, v in zip(times, values, strict=True) if v is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=3.5, label=label)
    axes.invert_xaxis()  # as pictures are made: from noise to picture
    axes.set_ylim(bottom=0)
    axes.set_xlabel("timestep (noise on the left)")
    axes.set_ylabel("relative error, %")
    axes.set_title("The UNet's prediction, on the way of uncompressed pictures", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_layers(sensitivity: Sensitivity, path: Path, *, float_count: int = 0) -> None:
    """Draw what each layer alone does to the output; the first ``float_count`` are in float now."""
    layers = sensitivity.layers[:_MOST_LAYERS]
    figure, axes = _figure(6.4, 1.0 + 0.19 * len(layers))
    colours = [_COLOURS[1] if i < float_count else _COLOURS[0] for i in range(len(layers))]
    rows = range(len(layers))
    axes.barh(rows, [100 * layer.error for layer in layers], color=colours)
    labels = [_label(layer.name, len(layer.nodes)) for layer in layers]
    axes.set_yticks(list(rows), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("relative error of the output with this alone compressed, %", fontsize=9)
    title = f"{sensitivity.component}: most sensitive of {len(sensitivity.layers)}"
    axes.set_title(f"{title} (orange: back in float)" if float_count else title, fontsize=10)
    _save(figure, path)


def draw_heat_map(
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    taken: Sequence[int],
    path: Path,
    *,
    title: str,
    scale: str,
) -> None:
    """Draw ``values`` [rows, columns], NaN left blank, with a ring in the column each row takes."""
    figure, axes = _figure(7.2, 1.6 + 0.15 * len(rows))
    axes.grid(visible=False)
    drawn = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.scatter(taken, range(len(rows)), s=16, facecolors="none", edgecolors="red")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [_label(name, 1) for name in rows], fontsize=6)
    axes.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, label=scale, shrink=0.6)
    _save(figure, path)


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw losses by name, each [(iteration, value)], on a logarithmic scale."""
    figure, axes = _figure(6.4, 3.6)
    for name, points in curves.items():
        positive = [point for point in points if point[1] > 0]
        if positive:
            axes.plot(*zip(*positive, strict=True), linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_title("What the student is away from its teacher", fontsize=10)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def draw_pictures(
    before: Sequence[NDArray[np.uint8]], after: Sequence[NDArray[np.uint8]], path: Path
) -> int:
    """Put pictures side by side: uncompressed, compressed, their difference; returns how many."""
    from PIL import Image

    pairs = list(zip(before, after, strict=False))[:_MOST_PICTURES]
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (len(pairs) * step + _GAP, 3 * step + _GAP), "white")
    for column, (one, other) in enumerate(pairs):
        difference = other.astype(np.float32) - one.astype(np.float32)
        amplified = np.clip(128 + _AMPLIFIED * difference, 0, 255).astype(np.uint8)
        for row, picture in enumerate((one, other, amplified)):
            shown = Image.fromarray(picture)
            shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            place = (_GAP + column * step, _GAP + row * step)
            sheet.paste(shown, place)
    _save_small(sheet, path)
    return len(pairs)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    with Image.open(buffer) as drawn:
        _save_small(drawn.convert("RGB"), path)


def _save_small(picture: Image.Image, path: Path) -> None:
    """Write a palette PNG below MAX_BYTES, with fewer colours and then smaller if need be."""
    for colours in (128, 64, 32, 32, 32, 16, 16):
        buffer = io.BytesIO()
        picture.quantize(colours).save(buffer, "PNG", optimize=True)
        if buffer.tell() < MAX_BYTES:
            break
        if colours <= 32:
            picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))
    path.write_bytes(buffer.getvalue())


def _label(name: str, count: int) -> str:
    text = short_name(name)
    if "/" in name:
        text = f"{text} ({name.rpartition('/')[2]})"
    if count > 1:
        text = f"{text} ({count} layers)"
    return text if len(text) <= _LONGEST_LABEL else f"...{text[3 - _LONGEST_LABEL :]}"
