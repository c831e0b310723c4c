"""The steps of a conversion: their names, and which share a process; progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["metadata", "record", "pass", "export", "calibrate", "compress"]
_KINDS: tuple[Kind, ...] = get_args(Kind)

# Steps of components smaller than this share a process: importing libraries takes as long as their
# work, and their memory does not matter.
_SMALL_BYTES = 400_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work, done by a worker process and finished as a whole."""

    kind: Kind
    #: Empty for steps that belong to no one component; which pass for passes, such as 1-prune.
    component: str = ""
    #: Bytes of the component's weights in the source.
    bytes: int = 0
    #: Bytes beside what stays, while it runs.
    scratch: int = 0

    @property
    def name(self) -> str:
        """Return what the step is called: on the command line, in state.json and in progress."""
        return f"{self.kind} {self.component}" if self.component else self.kind

    @property
    def trains(self) -> bool:
        """Whether the step is one of training."""
        return self.kind == "pass" and self.component.endswith("-distill")

    @classmethod
    def parse(cls, name: str) -> Step:
        """Return the step called ``name``, without its size."""
        kind, _, component = name.partition(" ")
        for known in _KINDS:
            if kind == known:
                return cls(known, component)
        raise ValueError(f"unknown step {name!r}")


def group(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Give the steps in order, those together that one process does.

    Small passes and exports share a process, and so do small compressions; anything large is alone.
    Where all of them together are small, all share one, but for training.
    """
    small = sum(step.bytes for step in steps) <= _SMALL_BYTES
    batch: list[Step] = []
    for step in steps:
        fits = batch and _family(batch[-1], small) == _family(step, small)
        if batch and not (fits and sum(s.bytes for s in batch) + step.bytes <= _SMALL_BYTES):
            yield batch
            batch = []
        batch.append(step)
    if batch:
        yield batch


def _family(step: Step, small: bool) -> str:
    """Return with which others a step may share a process.

    Training keeps its memory, the others give it back. Unless all is small, those share that load
    the same libraries.
    """
    if step.trains:
        return "train"
    if small:
        return "small"
    if step.kind in ("metadata", "export"):
        return "networks"
    return "torch" if step.kind in ("record", "pass") else step.kind


#: Called with the name of a step and the share of it done, 0 to 1.
StepProgress = Callable[[str, float], None]


#: Called with what is being done and the share of the whole conversion done, 0 to 1.
Progress = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Show nothing."""
