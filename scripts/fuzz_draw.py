"""What an input of the fuzzer is made with, and what it is once it is made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz_child import Job
from fuzz_files import Change, Room, files_under
from fuzz_templates import DRAW, PROMPT, Templates
from fuzz_verdicts import UNTOUCHED, Expected

GENERATE = ("generate", PROMPT, "-m", "model", *DRAW, "-o", "picture.png")
DRY_RUN = ("convert", "source", "out", "--dry-run")
#: Seconds, nearly all of them imports in its worker.
REAL = ("convert", "source", "out", "--recipe", "fp16", "--no-gate")
#: The same, and a picture of it.
FIRST_USE = ("generate", PROMPT, "-m", "source", "--recipe", "fp16", *DRAW, "-o", "picture.png")
#: Larger files, of which a change of a byte says less.
_LARGE = (".bin", ".xml", ".blob", ".safetensors")
_SMALL_SHARE = 0.4


@dataclass(slots=True)
class Draw:
    """What a kind builds an input with."""

    rng: Random
    room: Room
    templates: Templates
    #: Nothing may be damaged.
    healthy: bool
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = self.room.environment()

    def chance(self, share: float) -> bool:
        """Return True this share of the time, and never for a healthy input."""
        return not self.healthy and self.rng.random() < share

    def times(self) -> int:
        """Return how many changes to make."""
        return 0 if self.healthy else self.rng.choice((1, 1, 2, 3))

    def copy(self, template: Path, name: str) -> Path:
        """Copy a file or folder into the current folder of the command."""
        target = self.room.cwd / name
        if template.is_dir():
            shutil.copytree(template, target)
        else:
            shutil.copyfile(template, target)
        return target

    def write(self, name: str, content: bytes) -> Path:
        """Write a file in the current folder of the command."""
        path = self.room.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def damage(self, *paths: Path) -> None:
        """Damage what is under ``paths``, unless the input is healthy."""
        files = [file for path in paths for file in (files_under(path) or [path])]
        small = [file for file in files if file.suffix not in _LARGE]
        for _ in range(self.times()):
            chosen = small if small and self.rng.random() < _SMALL_SHARE else files
            self.room.damage(self.rng, chosen)

    def note(self, file: str, what: str) -> None:
        """Say what was done to a file."""
        self.room.changes.append(Change(file, what))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kind decides: the command, and what departs from the usual."""

    arguments: Sequence[str]
    silent: bool = False
    untouched: tuple[str, ...] = UNTOUCHED
    quoted: bool = False
    #: As in `fuzz_child.Job`.
    enough: float | None = None
    fresh: bool = False
    user: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One input: what runs, and what is known of the right answer."""

    kind: str
    seed: int
    number: int
    job: Job
    expected: Expected
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """As `--replay` takes it."""
        return f"{self.kind}:{self.seed}:{self.number}"
