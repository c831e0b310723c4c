"""What a caption says about the layout of its scene, as classes for the text encoder's training.

The objects are put in the order in which they stand, from the left or from the top, so that "a ring
to the right of a star" and "a star to the left of a ring" are one layout. Knowing that is most of
what the UNet needs from the text, and a classifier learns it in a hundredth of the UNet's time.
"""

from __future__ import annotations

import numpy as np
import scenes
from numpy.typing import NDArray

#: Classes of each label; class 0 of all but the axis says that the caption leaves it open.
COUNTS: tuple[int, ...] = (
    3,  # axis: one object, side by side, one above the other
    len(scenes.COLOURS) + 1,  # background
    len(scenes.POSITIONS) + 1,
    *((len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1, len(scenes.RADII) + 1) * 2),
)


def layout_labels(prompt: scenes.Prompt) -> NDArray[np.int64]:
    """Return the classes of a prompt, int64 [len(COUNTS)]."""
    objects = list(prompt.objects)
    axis = 0
    if prompt.relation is not None:
        axis = 1 if prompt.relation.startswith("to the") else 2
        if prompt.relation in ("to the right of", "below"):
            objects.reverse()
    labels = [
        axis,
        _class(prompt.background, tuple(scenes.COLOURS)),
        _class(prompt.position, tuple(scenes.POSITIONS)),
    ]
    for i in range(2):
        if i >= len(objects):
            labels += [0, 0, 0]
            continue
        labels += [
            _class(objects[i].colour, tuple(scenes.COLOURS)),
            _class(objects[i].shape, scenes.SHAPES),
            _class(objects[i].size, tuple(scenes.RADII)),
        ]
    return np.array(labels, np.int64)


def _class(value: str | None, values: tuple[str, ...]) -> int:
    return 0 if value is None else 1 + values.index(value)
