"""The stages of a distillation as shares of the whole."""

from __future__ import annotations

from collections.abc import Callable

from sdvino.train.distillation.settings import DistillSettings

# Texts and pictures: some percent of the whole, whatever the rest is.
_MATERIAL = 0.03


def whole(
    settings: DistillSettings, progress: Callable[[float], None]
) -> Callable[[str, float], None]:
    """Return a progress of stages that tells ``progress`` the share of the whole that is done."""
    drawing = settings.drawing_evaluations / settings.evaluations
    spans = {
        "texts": (0.0, _MATERIAL),
        "pictures": (_MATERIAL, 2 * _MATERIAL),
        "drawing": (_MATERIAL, _MATERIAL + (1 - _MATERIAL) * drawing),
        "training": (_MATERIAL + (1 - _MATERIAL) * drawing, 1.0),
    }

    def show(stage: str, share: float) -> None:
        start, end = spans[stage]
        progress(start + (end - start) * share)

    return show
