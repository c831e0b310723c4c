"""Which option each layer takes, so that all fit into a budget of bytes and the damage is least.

A multiple-choice knapsack, solved greedily on the lower convex hulls of the layers' options
(Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", 1979): from the smallest options on,
the exchange that saves most damage for a byte comes first. What is left of the budget then goes to
single exchanges that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a layer."""

    bytes: int
    #: Damages of layers add up.
    damage: float


def least_bytes(layers: Sequence[Sequence[Option]]) -> int:
    """Return what the layers take when each takes its smallest option."""
    return sum(min(option.bytes for option in options) for options in layers)


def allocate(layers: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return the index of the option that each layer takes.

    Together they take ``budget`` bytes at most. At ``budget`` less one exchange of a single layer
    no choice has less damage than this one. The same input gives the same choice. Raises ValueError
    when the layers' smallest options do not fit.
    """
    if least_bytes(layers) > budget:
        raise ValueError(f"{least_bytes(layers)} bytes are needed, and the budget is {budget}")
    hulls = [_hull(options) for options in layers]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(layers[i][option].bytes for i, option in enumerate(chosen))
    exchanges = []
    for i, hull in enumerate(hulls):
        for step in range(1, len(hull)):
            smaller, larger = layers[i][hull[step - 1]], layers[i][hull[step]]
            gain = (smaller.damage - larger.damage) / (larger.bytes - smaller.bytes)
            exchanges.append((-gain, i, step))
    for _, i, step in sorted(exchanges):
        cost = layers[i][hulls[i][step]].bytes - layers[i][chosen[i]].bytes
        if cost > left:
            break
        chosen[i] = hulls[i][step]
        left -= cost
    _spend(layers, chosen, left)
    return chosen


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull of damage over bytes, the smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].damage, i))
    hull: list[int] = []
    for i in order:
        if hull and options[i].damage >= options[hull[-1]].damage:
            continue  # no smaller, and no better
        while len(hull) > 1 and _above(options[hull[-2]], options[hull[-1]], options[i]):
            hull.pop()
        hull.append(i)
    return hull


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Tell whether ``middle`` lies on or above the line from ``first`` to ``last``."""
    drop = (first.damage - middle.damage) * (last.bytes - first.bytes)
    return drop <= (first.damage - last.damage) * (middle.bytes - first.bytes)


def _spend(layers: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Take, in place, single exchanges that fit into ``left`` bytes, the largest gain first."""
    while True:
        best: tuple[float, int, int] | None = None
        for i, options in enumerate(layers):
            now = options[chosen[i]]
            for j, option in enumerate(options):
                gain = now.damage - option.damage
                if (
                    gain > 0.0
                    and option.bytes - now.bytes <= left
                    and (best is None or gain > best[0])
                ):
                    best = (gain, i, j)
        if best is None:
            return
        _, i, j = best
        left -= layers[i][j].bytes - layers[i][chosen[i]].bytes
        chosen[i] = j
