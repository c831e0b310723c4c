"""Reads a scene back from its pixels and says whether it is what a prompt asked for.

It knows the palette and the shapes, not the prompt: reading and judging are two steps. Every
uncertain step is strict, since a picture that cannot be read should not count as right.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import scenes
from numpy.typing import NDArray
from PIL import Image
from scenes import Prompt

COLOUR_NAMES = tuple(scenes.COLOURS)
PALETTE = np.array([scenes.COLOURS[name] for name in COLOUR_NAMES], np.float32)
COLOURS_BY_NAME = dict(zip(COLOUR_NAMES, PALETTE, strict=True))

MAX_COLOUR_DISTANCE = 60.0  # RGB; half the distance of the closest two colours, 117
BACKGROUND_DISTANCE = 50.0  # RGB; beyond it a pixel is not background
SMALLEST_OBJECT = 40  # pixels; specks below it are noise
MIN_ONE_COLOUR = 0.8  # share of an object's inner pixels that have its colour
MIN_OVERLAP = 0.75  # of an object with the closest shape (intersection over union)
# Between the radii the grammar draws, with equal room on both sides.
SMALL_BELOW, BIG_ABOVE = 20.6, 26.9
COLUMN_EDGES = (52.0, 76.0)  # pixels: between the grid's columns, and rows
RIM = 2  # pixels of soft edge around what is clearly not background
MIN_APART = 8.0  # pixels between two centres for one to be left of, or above, the other

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """An object as read: centre of its bounding box and half its longer side, in pixels,
    of the drawn shape that is closest to it."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float

    @property
    def size(self) -> str:
        """small, medium or big."""
        if self.radius < SMALL_BELOW:
            return "small"
        return "big" if self.radius > BIG_ABOVE else "medium"


@dataclass(frozen=True)
class Reading:
    """A picture as read; `background` is None and objects are missing where nothing is certain."""

    background: str | None
    objects: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is what a prompt asked for, by attribute.

    The objects are matched to the prompt's in the order that makes most attributes right.
    """

    count: bool
    colour: bool
    shape: bool
    background: bool
    size: bool
    relation: bool
    position: bool

    @property
    def core(self) -> bool:
        """Colour, shape and background right, and the relation where there is one."""
        return self.count and self.colour and self.shape and self.background and self.relation

    @property
    def right(self) -> bool:
        """Everything the prompt asked for."""
        return self.core and self.size and self.position


def read(picture: Image.Image | NDArray[np.uint8]) -> Reading:
    """Read background and objects from a picture, RGB, 128 x 128 (other sizes are resized)."""
    if isinstance(picture, Image.Image):
        size = (scenes.PICTURE_SIZE, scenes.PICTURE_SIZE)
        picture = picture.convert("RGB")
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32)
    background = _read_background(pixels)
    if background is None:
        return Reading(None, ())
    colour = np.array(background, np.float32)
    foreground = np.square(pixels - colour).sum(2) > BACKGROUND_DISTANCE**2
    objects = []
    for mask in components(foreground):
        seen = _read_object(pixels, mask, colour)
        if seen is None:  # something is there that is no object of ours
            return Reading(_nearest(colour), ())
        objects.append(seen)
    return Reading(_nearest(colour), tuple(objects))


def _read_background(pixels: Floats) -> tuple[float, ...] | None:
    """Return the mean colour of the background, or None when it is no plain colour of ours."""
    frame = np.concatenate([pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1)])
    frame = np.concatenate([frame.reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    middle = np.median(frame, 0)
    near = np.square(frame - middle).sum(1) < BACKGROUND_DISTANCE**2
    # Objects keep off the edge of the picture, so most of the frame is background.
    if near.mean() < 0.75:
        return None
    mean = frame[near].mean(0)
    return tuple(map(float, mean)) if _nearest(mean) is not None else None


def _nearest(colour: NDArray[np.floating]) -> str | None:
    distance = np.sqrt(np.square(PALETTE - colour).sum(1))
    best = int(distance.argmin())
    return COLOUR_NAMES[best] if distance[best] < MAX_COLOUR_DISTANCE else None


def components(mask: Mask) -> list[Mask]:
    """Return the connected parts of a mask, 8-connected, largest first, without specks."""
    labels = np.zeros(mask.shape, np.int32)
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    above: list[tuple[int, int, int]] = []  # start, end, label of the runs in the row above
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
        runs = []
        for start, end in edges.reshape(-1, 2).tolist():
            touching = [root(label) for s, e, label in above if s <= end and e >= start]
            if touching:
                label = min(touching)
                for other in touching:
                    parents[other] = label
            else:
                label = len(parents)
                parents.append(label)
            labels[y, start:end] = label
            runs.append((start, end, label))
        above = runs
    if len(parents) == 1:
        return []
    labels = np.array([root(label) for label in range(len(parents))])[labels]
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")
    return [labels == label for label in order.tolist() if areas[label] >= SMALLEST_OBJECT]


def _read_object(pixels: Floats, mask: Mask, background: Floats) -> Seen | None:
    """Read one object from the pixels of a component, or None when it is none of ours."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = max(rows[0] - RIM, 0), max(columns[0] - RIM, 0)
    window = (slice(top, rows[-1] + RIM + 1), slice(left, columns[-1] + RIM + 1))
    pixels, mask = pixels[window], mask[window]
    own = _own_colour(pixels[mask], background)
    if own is None:
        return None
    alpha = _coverage(pixels, COLOURS_BY_NAME[own], background)
    for _ in range(RIM):  # the soft edge belongs to the object, another object does not
        mask = _dilate(mask)
    return _read_shape(alpha * mask, own, float(left), float(top))


def _own_colour(inside: Floats, background: Floats) -> str | None:
    """Return the name of the colour that an object's pixels, [n, 3], have; None if they have not.

    Soft edges are mixtures with the background, so a pixel is the object's when it lies close to
    the line between the two colours.
    """
    distance = np.square(inside - background).sum(1)
    core = inside[distance >= 0.64 * np.quantile(distance, 0.9)]
    votes = np.square(core[:, None] - PALETTE).sum(2).argmin(1)
    counts = np.bincount(votes, minlength=len(PALETTE))
    best = int(counts.argmax())
    own = core[votes == best].mean(0)
    if _nearest(own) != COLOUR_NAMES[best] or counts[best] < MIN_ONE_COLOUR * len(core):
        return None
    alpha = _coverage(inside, own, background)[:, None]
    off = np.square(inside - (background + alpha * (own - background))).sum(1)
    on_line = off < MAX_COLOUR_DISTANCE**2
    return COLOUR_NAMES[best] if on_line.mean() >= MIN_ONE_COLOUR else None


def _coverage(pixels: Floats, own: Floats, background: Floats) -> Floats:
    """Return how far each pixel, [..., 3], is on the way from the background to a colour."""
    way = own - background
    alpha = (pixels - background) @ way / float(way @ way)
    return np.clip(alpha, 0, 1).astype(np.float32)


def _read_shape(alpha: Floats, colour: str, left: float, top: float) -> Seen | None:
    """Compare an object with each shape drawn over it; None when it is like none.

    Each shape is drawn with the object's area and centre of mass, which blur does not change as
    it does the bounding box.
    """
    area = float(alpha.sum())
    if not area > 0:  # its pixels lie on the far side of the background from their own colour
        return None
    x = float(alpha.sum(0) @ (np.arange(alpha.shape[1]) + 0.5)) / area
    y = float(alpha.sum(1) @ (np.arange(alpha.shape[0]) + 0.5)) / area
    best, found = MIN_OVERLAP, None
    for shape in scenes.SHAPES:
        unit_area, dx, dy = _moments(shape)
        radius = math.sqrt(area / unit_area)
        cx, cy = x - dx * radius, y - dy * radius
        size = max(alpha.shape)
        drawn = scenes.coverage(shape, radius, cx, cy, size)[: alpha.shape[0], : alpha.shape[1]]
        # What the drawn shape has outside the window counts against it.
        union = float(np.maximum(alpha, drawn).sum()) + max(area - float(drawn.sum()), 0.0)
        overlap = float(np.minimum(alpha, drawn).sum()) / union
        if overlap >= best:
            best, found = overlap, Seen(colour, shape, radius, left + cx, top + cy)
    return found


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return area and centre of mass of a shape of radius 1 centred on the origin."""
    half = 64.0
    alpha = scenes.coverage(shape, half, half, half, 128)
    area = float(alpha.sum())
    at = np.arange(128) + 0.5 - half
    return (
        area / half**2,
        float(alpha.sum(0) @ at) / area / half,
        float(alpha.sum(1) @ at) / area / half,
    )


def _dilate(mask: Mask) -> Mask:
    grown: Mask = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def judge(reading: Reading, prompt: Prompt) -> Verdict:
    """Say which attributes of a prompt a reading has."""
    background = reading.background is not None and prompt.background in (None, reading.background)
    if len(reading.objects) != len(prompt.objects):
        return Verdict(False, False, False, background, False, False, False)
    orders = [reading.objects]
    if len(reading.objects) == 2:
        orders.append(reading.objects[::-1])
    verdicts = [_judge_in_order(order, prompt, background) for order in orders]
    return max(verdicts, key=lambda v: (v.core, v.right, v.colour + v.shape, v.relation, v.size))


def check(picture: Image.Image | NDArray[np.uint8], prompt: Prompt) -> Verdict:
    """Read a picture and judge it by a prompt."""
    return judge(read(picture), prompt)


def _judge_in_order(seen: tuple[Seen, ...], prompt: Prompt, background: bool) -> Verdict:
    pairs = list(zip(seen, prompt.objects, strict=True))
    return Verdict(
        count=True,
        colour=all(thing.colour == wanted.colour for thing, wanted in pairs),
        shape=all(thing.shape == wanted.shape for thing, wanted in pairs),
        background=background,
        size=all(wanted.size in (None, thing.size) for thing, wanted in pairs),
        relation=prompt.relation is None or holds(prompt.relation, seen[0], seen[1]),
        position=prompt.position is None or scenes.POSITIONS[prompt.position] == cell(seen[0]),
    )


def holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether the first object stands in this relation to the second, by their centres."""
    dx, dy = second.x - first.x, second.y - first.y
    towards = {
        "to the left of": (dx, dy),
        "to the right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }
    along, across = towards[relation]
    return along >= MIN_APART and along > abs(across)


def cell(seen: Seen) -> tuple[int, int]:
    """The column and row of the 3 x 3 grid in which an object's centre lies."""
    column, row = np.searchsorted(COLUMN_EDGES, (seen.x, seen.y))
    return int(column), int(row)
