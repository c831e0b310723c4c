"""The table of kinds, and the input that a kind, a seed and a number stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_kinds
import fuzz_pictures
import fuzz_places
from fuzz_child import Job
from fuzz_draw import Case, Draw, Plan
from fuzz_files import Room
from fuzz_templates import Templates
from fuzz_verdicts import Expected


@dataclass(frozen=True, slots=True)
class Kind:
    """How inputs of a kind are made, and how many of them in a round."""

    plan: Callable[[Draw], Plan]
    weight: int


KINDS: Mapping[str, Kind] = {
    "model": Kind(fuzz_kinds.model, 5),
    "graph": Kind(fuzz_kinds.graph, 3),
    "source": Kind(fuzz_kinds.source, 4),
    "checkpoint": Kind(fuzz_kinds.checkpoint, 4),
    "lora": Kind(fuzz_kinds.lora, 2),
    "vae": Kind(fuzz_kinds.vae, 2),
    "recipe": Kind(fuzz_kinds.recipe, 3),
    "picture": Kind(fuzz_pictures.picture, 4),
    "prompts": Kind(fuzz_kinds.prompts, 1),
    "flags": Kind(fuzz_places.flags, 4),
    "environment": Kind(fuzz_places.environment, 1),
    "cache": Kind(fuzz_places.cache, 3),
    "work": Kind(fuzz_places.work, 2),
}


def build(kind: str, seed: int, number: int, folder: Path, templates: Templates) -> Case:
    """Make the input under ``folder``, which must not exist. Number 0 is healthy."""
    room = Room(folder)
    draw = Draw(Random(f"{kind}:{seed}:{number}"), room, templates, healthy=number == 0)
    plan = KINDS[kind].plan(draw)
    return Case(
        kind=kind,
        seed=seed,
        number=number,
        job=Job(
            arguments=plan.arguments,
            environment=draw.environment,
            cwd=room.cwd,
            output=folder / "output",
            enough=plan.enough,
            fresh=plan.fresh,
            user=plan.user,
        ),
        expected=Expected(draw.healthy, plan.silent, untouched=plan.untouched, quoted=plan.quoted),
        changes=tuple(map(str, room.changes)),
    )


def sequence(kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield kind and number for ever: what is healthy first, then each kind by its weight."""
    yield from ((kind, 0) for kind in kinds)
    numbers = dict.fromkeys(kinds, 0)
    while True:
        for kind in kinds:
            for _ in range(KINDS[kind].weight):
                numbers[kind] += 1
                yield kind, numbers[kind]
