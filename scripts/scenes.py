"""The world of the demo model: flat-colour scenes, how they are drawn and how they are described.

A scene holds one object, or two in relation, on a plain background. It is drawn at 128 x 128 with
antialiased edges and described by a caption such as "a green star above a small red ring on a
black background". Some (colour, shape, background) triples are held out: no training scene
contains one, so that prompts made of them measure composition rather than memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PICTURE_SIZE = 128  # pixels, both ways
SUPERSAMPLING = 4  # per axis: 17 levels of coverage at an edge

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (255, 130, 0),
    "yellow": (255, 235, 60),
    "green": (30, 150, 60),
    "cyan": (60, 210, 225),
    "blue": (30, 70, 220),
    "purple": (140, 40, 170),
    "pink": (255, 115, 185),
    "white": (255, 255, 255),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")
# Half the longer side of an object's bounding box, in pixels. Two big ones fit side by side.
RADII = {"small": 17.5, "medium": 23.75, "big": 30.0}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "big": ("big", "large")}
RELATIONS = ("to the left of", "to the right of", "above", "below")
POSITIONS: dict[str, tuple[int, int]] = {  # (column, row) of a 3 x 3 grid
    "in the top left corner": (0, 0),
    "at the top": (1, 0),
    "in the top right corner": (2, 0),
    "on the left": (0, 1),
    "in the center": (1, 1),
    "on the right": (2, 1),
    "in the bottom left corner": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right corner": (2, 2),
}
# Objects are centred in the middle of a cell of that grid. A shape then has few appearances in the
# latents, which is what a network this small can learn to draw sharply in an hour.
GRID_CENTRES = (32.0, 64.0, 96.0)  # pixels: the middle of each column and row

HELD_OUT_SEED = 20240607
HELD_OUT_SHARE = 1 / 6

Triple = tuple[str, str, str]  # colour, shape, background


@dataclass(frozen=True)
class Placed:
    """An object as drawn: centre and half its longer side in pixels, y downwards."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What is drawn: one object or two on a plain background."""

    background: str
    objects: tuple[Placed, ...]


@dataclass(frozen=True)
class Wanted:
    """An object as described; a size of None was left open."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for. Whatever is None was left open, and any value of it is right.

    `relation` says where the first of two objects stands as seen from the second.
    """

    objects: tuple[Wanted, ...]
    background: str | None
    position: str | None = None
    relation: str | None = None
    text: str = ""


def all_triples() -> list[Triple]:
    """Every (colour, shape, background) with the object's colour unlike the background's."""
    return [
        (colour, shape, background)
        for colour, shape, background in itertools.product(COLOURS, SHAPES, COLOURS)
        if colour != background
    ]


@functools.cache
def held_out_triples() -> frozenset[Triple]:
    """Return the triples, a sixth of all, that training never shows; always the same ones."""
    triples = all_triples()
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(triples))
    return frozenset(triples[i] for i in order[: round(HELD_OUT_SHARE * len(triples))])


@functools.cache
def _palette(held_out: bool) -> dict[str, list[tuple[str, str]]]:
    """For each background the (colour, shape) pairs that are held out, or those that are not."""
    pairs: dict[str, list[tuple[str, str]]] = {background: [] for background in COLOURS}
    for colour, shape, background in all_triples():
        if ((colour, shape, background) in held_out_triples()) == held_out:
            pairs[background].append((colour, shape))
    return pairs


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _pick_objects(
    rng: np.random.Generator, count: int, held_out: bool
) -> tuple[str, list[tuple[str, str]]]:
    """Draw a background and `count` (colour, shape) pairs of different colours."""
    background = _pick(rng, tuple(COLOURS))
    pairs = _palette(held_out)[background]
    while True:
        chosen = [pairs[int(i)] for i in rng.integers(len(pairs), size=count)]
        if len({colour for colour, _ in chosen}) == count:
            return background, chosen


def _place_one(colour: str, shape: str, size: str, position: str) -> tuple[Placed, ...]:
    column, row = POSITIONS[position]
    return (Placed(colour, shape, RADII[size], GRID_CENTRES[column], GRID_CENTRES[row]),)


def _place_two(pairs: list[tuple[str, str]], sizes: list[str], relation: str) -> tuple[Placed, ...]:
    """Put two objects at the ends of the middle row or column."""
    first, middle, last = GRID_CENTRES
    along = [last, first] if relation in ("to the right of", "below") else [first, last]
    placed = []
    for (colour, shape), size, u in zip(pairs, sizes, along, strict=True):
        x, y = (u, middle) if relation.startswith("to the") else (middle, u)
        placed.append(Placed(colour, shape, RADII[size], x, y))
    return tuple(placed)


def sample_scene(
    rng: np.random.Generator, count: int | None = None, held_out: bool = False
) -> tuple[Scene, Prompt]:
    """Draw a scene and a caption that is true of it.

    Args:
        rng: the only source of randomness.
        count: 1 or 2 objects; two in three scenes have two when None.
        held_out: False for training; True when every triple of the scene shall be a held-out one.
    """
    if count is None:
        count = 1 if rng.random() < 1 / 3 else 2
    background, pairs = _pick_objects(rng, count, held_out)
    sizes = [_pick(rng, tuple(RADII)) for _ in pairs]
    relation = position = None
    if count == 1:
        position = _pick(rng, tuple(POSITIONS))
        objects = _place_one(*pairs[0], sizes[0], position)
        if rng.random() < 0.4:
            position = None
    else:
        relation = _pick(rng, RELATIONS)
        objects = _place_two(pairs, sizes, relation)
    wanted = tuple(
        Wanted(colour, shape, size if rng.random() < 0.6 else None)
        for (colour, shape), size in zip(pairs, sizes, strict=True)
    )
    # Now and then the caption leaves the background open; a held-out one never does.
    named = background if held_out or rng.random() < 0.97 else None
    prompt = Prompt(wanted, named, position, relation)
    text = caption(prompt, rng)
    return Scene(background, objects), Prompt(wanted, named, position, relation, text)


def caption(prompt: Prompt, rng: np.random.Generator | None = None) -> str:
    """Put a prompt into words: the plain form, or with an rng sometimes another wording."""

    def rarely(share: float) -> bool:
        return rng is not None and bool(rng.random() < share)

    article = "" if rarely(0.1) else "a "
    names = []
    for wanted in prompt.objects:
        words = [wanted.colour, wanted.shape]
        if wanted.size is not None:
            spellings = SIZE_WORDS[wanted.size]
            words.insert(0, spellings[-1] if rarely(0.2) else spellings[0])
        if article:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        names.append(" ".join(words))
    parts = [names[0]]
    if prompt.relation is not None:
        parts += [prompt.relation, names[1]]
    if prompt.position is not None:
        parts.append(prompt.position)
    if prompt.background is not None:
        parts.append(_background_words(prompt.background, article, rarely(0.15), rarely(0.5)))
    return " ".join(parts)


def _background_words(colour: str, article: str, other: bool, short: bool) -> str:
    if article:
        article = "an " if colour[0] in "aeiou" else "a "
    if not other:
        return f"on {article}{colour} background"
    return f"on {colour}" if short else f"against {article}{colour} background"


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, sorted."""
    words = {*COLOURS, *SHAPES, "a", "an", "on", "against", "background"}
    for phrase in itertools.chain(*SIZE_WORDS.values(), RELATIONS, POSITIONS):
        words.update(phrase.split())
    return tuple(sorted(words))


@functools.cache
def outline(shape: str) -> NDArray[np.float64]:
    """Return a shape's outline, [points, 2], centred, its longer side reaching from -1 to 1."""
    turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    if shape in ("circle", "ring"):
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "triangle":
        points = np.array([(0, -math.sqrt(3) / 2), (1, math.sqrt(3) / 2), (-1, math.sqrt(3) / 2)])
    elif shape == "diamond":
        points = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)], float)
    elif shape == "star":
        angle = np.arange(10) * math.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        points = np.stack([reach * np.sin(angle), -reach * np.cos(angle)], 1)
    elif shape == "cross":
        w = 0.34
        quarter = [(-w, -1), (w, -1), (w, -w), (1, -w)]
        turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        points = np.concatenate([np.array(quarter)[:3] @ matrix for matrix in turns])
    elif shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([x, -y], 1)
    else:
        raise ValueError(f"no such shape: {shape!r}; the shapes are {', '.join(SHAPES)}")
    low, high = points.min(0), points.max(0)
    centred: NDArray[np.float64] = (points - (low + high) / 2) / ((high - low).max() / 2)
    return centred


RING_HOLE = 0.52  # of the outer radius


def coverage(shape: str, radius: float, x: float, y: float, size: int) -> NDArray[np.float32]:
    """Return how much of each pixel of a size x size picture the shape covers, [size, size]."""
    scale = SUPERSAMPLING
    canvas = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(canvas)
    # PIL addresses pixel centres, hence the half.
    centre = np.array([x, y]) * scale - 0.5
    points = outline(shape) * radius * scale
    pen.polygon([(float(px), float(py)) for px, py in points + centre], fill=255)
    if shape == "ring":
        pen.polygon([(float(px), float(py)) for px, py in points * RING_HOLE + centre], fill=0)
    covered: NDArray[np.float32] = np.asarray(canvas.reduce(scale), np.float32) / np.float32(255)
    return covered


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 [128, 128, 3]."""
    picture = np.empty((PICTURE_SIZE, PICTURE_SIZE, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    for thing in scene.objects:
        # Only the patch around the object is rasterised; the rest of the picture stays as it is.
        half = math.ceil(thing.radius) + 2
        left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
        alpha = coverage(thing.shape, thing.radius, thing.x - left, thing.y - top, 2 * half + 1)
        rows = slice(max(top, 0), min(top + 2 * half + 1, PICTURE_SIZE))
        columns = slice(max(left, 0), min(left + 2 * half + 1, PICTURE_SIZE))
        alpha = alpha[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        patch = picture[rows, columns]
        patch += alpha[..., None] * (np.array(COLOURS[thing.colour], np.float32) - patch)
    return np.rint(picture).astype(np.uint8)
