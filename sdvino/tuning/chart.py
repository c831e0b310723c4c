"""A bar chart of what `sdvino tune` tried, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from sdvino.tuning.axes import Choice
from sdvino.tuning.search import Trial

if TYPE_CHECKING:
    _Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_WIDTH, _MARGIN, _ROW, _BAR = 960, 20, 26, 16
#: Where the bars begin, and the longest ends.
_LEFT, _RIGHT = 400, 860
_INK, _MUTED, _TRIED, _CHOSEN = "#202020", "#707070", "#9db4cf", "#2f6fb0"


def draw_trials(trials: Mapping[str, Sequence[Trial[Choice]]], title: str) -> Image.Image:
    """Draw every trial of every component as a bar, the chosen ones dark.

    Bars begin at zero, and those of one group share a scale: the seconds of the fastest run, which
    stand beside them. What could not be run has its reason in place of a bar.
    """
    groups = _groups(trials)
    rows = sum(1 + len(entries) for entries in groups.values())
    height = 2 * _MARGIN + _ROW * (2 + rows) + 10 * len(groups)
    picture = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    large, small = _font(17), _font(13)
    draw.text((_MARGIN, _MARGIN), _fit(draw, title, large, _WIDTH - 2 * _MARGIN), _INK, large)
    note = "seconds of the fastest run, from zero; shorter is faster; dark: chosen"
    draw.text((_MARGIN, _MARGIN + _ROW), note, _MUTED, small)
    top = _MARGIN + 2 * _ROW
    for heading, entries in groups.items():
        top += 10
        draw.text((_MARGIN, top + 4), heading, _INK, small)
        top += _ROW
        longest = max((trial.best for trial in entries if trial.seconds), default=1.0)
        for trial in entries:
            _draw_trial(draw, trial, top, longest, small)
            top += _ROW
    return picture


def _groups(
    trials: Mapping[str, Sequence[Trial[Choice]]],
) -> dict[str, list[Trial[Choice]]]:
    groups: dict[str, list[Trial[Choice]]] = {}
    for component, entries in trials.items():
        for trial in entries:
            guided = trial.candidate.settings.guidance_mode is not None
            what = "two predictions" if guided else "one run"
            groups.setdefault(f"{component}: {trial.axis} ({what})", []).append(trial)
    return groups


def _draw_trial(
    draw: ImageDraw.ImageDraw, trial: Trial[Choice], top: int, longest: float, font: _Font
) -> None:
    label = _fit(draw, trial.candidate.label, font, _LEFT - 2 * _MARGIN - 10)
    draw.text((_MARGIN + 10, top + 4), label, _INK, font)
    if trial.problem is not None:
        reason = _fit(draw, f"not usable: {trial.problem}", font, _WIDTH - _LEFT - _MARGIN)
        draw.text((_LEFT, top + 4), reason, _MUTED, font)
        return
    length = round((_RIGHT - _LEFT) * trial.best / longest) if longest > 0 else 0
    corners = (_LEFT, top + 4, _LEFT + max(1, length), top + 4 + _BAR)
    draw.rectangle(corners, _CHOSEN if trial.chosen else _TRIED)
    draw.text((corners[2] + 6, top + 4), f"{trial.best:.3f} s", _INK, font)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """Return ``text``, cut at its end where it is wider than ``width``."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)
