"""The search behind `sdvino tune`: one axis after another, each by elimination, within a time.

Nothing here knows a device: what is measured, and the clock, are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sdvino.errors import SdvinoError

S = TypeVar("S")
#: Seconds of one run under some settings; raises SdvinoError where they cannot be run with.
Measure = Callable[[S], float]

#: Other settings must be so much faster than what is used already: two timings of the same thing
#: differ by about as much.
MARGIN = 0.03


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """Settings, and how people call them."""

    label: str
    settings: S


@dataclass(frozen=True, slots=True)
class Axis(Generic[S]):
    """Settings that exclude each other; ``candidates`` of the best so far, itself first."""

    name: str
    candidates: Callable[[S], Sequence[Candidate[S]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Generic[S]):
    """What was measured of one candidate."""

    axis: str
    candidate: Candidate[S]
    #: Each run's, in the order of measuring.
    seconds: tuple[float, ...]
    #: Why it cannot be used, in one sentence.
    problem: str | None = None
    #: Whether it is the one that its axis ended with.
    chosen: bool = False

    @property
    def best(self) -> float:
        """The least seconds: what other programs do only ever adds to them."""
        return min(self.seconds, default=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Generic[S]):
    """What a search ended with."""

    settings: S
    #: The fastest run under ``start`` as the first axis has it, and under ``settings``, where they
    #: were measured: the same seconds where they are the same settings.
    default_seconds: float | None
    seconds: float | None
    trials: tuple[Trial[S], ...]
    #: Whether every axis was measured; otherwise the time was up, or the user stopped it.
    complete: bool
    interrupted: bool = False


def search(
    start: S,
    axes: Sequence[Axis[S]],
    measure: Measure[S],
    *,
    time_left: Callable[[], float],
    report: Callable[[Trial[S]], None] = lambda trial: None,
) -> Found[S]:
    """Return the fastest settings, from ``start`` on, changing one axis after the other.

    Each axis is decided by successive halving: a run of each candidate, two more of the faster half
    and so on. When ``time_left()`` seconds do not hold another measurement, or at Ctrl-C, what is
    best by then stands; what never ran faster than ``start`` did gives way to it. ``report`` is
    called after each candidate's runs.
    """
    best = start
    clock = _Clock(time_left)
    trials: list[Trial[S]] = []
    default: S | None = None
    stopped = interrupted = False
    for axis in axes:
        candidates = axis.candidates(best)
        if len(candidates) < 2 and trials:
            continue
        entries = [_Entry(axis.name, candidate) for candidate in candidates]
        try:
            stopped = not _halve(entries, measure, clock, report)
        except KeyboardInterrupt:
            stopped = interrupted = True
        winner = _winner(entries)
        if winner is not None:
            best = winner.candidate.settings
        if default is None and entries:
            default = entries[0].candidate.settings
        trials.extend(entry.trial(entry is winner) for entry in entries if entry.tried)
        if stopped:
            break
    default_seconds, seconds = _fastest(trials, default), _fastest(trials, best)
    if default is not None and best != default and _beats(default_seconds, seconds):
        # An axis was decided while other programs slowed down what had won before it.
        best, seconds = default, default_seconds
        trials = [replace(one, chosen=one.candidate.settings == default) for one in trials]
    return Found(
        settings=best,
        default_seconds=default_seconds,
        seconds=seconds,
        trials=tuple(trials),
        complete=not stopped,
        interrupted=interrupted,
    )


def _fastest(trials: Sequence[Trial[S]], settings: S | None) -> float | None:
    able = [trial for trial in trials if trial.problem is None and trial.seconds]
    return min((trial.best for trial in able if trial.candidate.settings == settings), default=None)


def _beats(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one <= other


class _Clock:
    """Knows whether another measurement fits: it takes as long as the longest so far."""

    def __init__(self, time_left: Callable[[], float]) -> None:
        self.time_left = time_left
        self._longest = 0.0

    def allows(self) -> bool:
        return self.time_left() > self._longest

    def time(self, work: Callable[[], float]) -> float:
        before = self.time_left()
        try:
            return work()
        finally:
            self._longest = max(self._longest, before - self.time_left())


class _Entry(Generic[S]):
    """A candidate of the axis at hand."""

    def __init__(self, axis: str, candidate: Candidate[S]) -> None:
        self.axis = axis
        self.candidate = candidate
        self.seconds: list[float] = []
        self.problem: str | None = None

    @property
    def tried(self) -> bool:
        return bool(self.seconds) or self.problem is not None

    def trial(self, chosen: bool = False) -> Trial[S]:
        return Trial(
            axis=self.axis,
            candidate=self.candidate,
            seconds=tuple(self.seconds),
            problem=self.problem,
            chosen=chosen,
        )


def _halve(
    entries: list[_Entry[S]],
    measure: Measure[S],
    clock: _Clock,
    report: Callable[[Trial[S]], None],
) -> bool:
    """Measure ``entries`` until one is left; return whether the time sufficed."""
    left, runs, last = entries, 1, False
    while left:
        for entry in left:
            for _ in range(runs):
                if not clock.allows():
                    return False
                _measure_once(entry, measure, clock)
                if entry.problem is not None:
                    break
            report(entry.trial())
        able = [entry for entry in left if entry.problem is None]
        left = sorted(able, key=lambda entry: min(entry.seconds))[: math.ceil(len(able) / 2)]
        if len(left) == 1:
            if last or left[0] is entries[0] or entries[0].problem is not None:
                return True
            # Whoever is to replace what is used already beats it side by side.
            left, last = [left[0], entries[0]], True
        runs *= 2
    return True


def _measure_once(entry: _Entry[S], measure: Measure[S], clock: _Clock) -> None:
    try:
        entry.seconds.append(clock.time(lambda: measure(entry.candidate.settings)))
    except SdvinoError as error:
        entry.problem = str(error)


def _winner(entries: list[_Entry[S]]) -> _Entry[S] | None:
    """Return the fastest, if it beats the first by `MARGIN`, else the first."""
    able = [entry for entry in entries if entry.seconds and entry.problem is None]
    if not able:
        return None
    best = min(able, key=lambda entry: min(entry.seconds))
    first = entries[0]
    if first in able and min(best.seconds) > min(first.seconds) * (1.0 - MARGIN):
        return first
    # Without a timing of what is used already nothing can be said to be faster.
    return best if first in able or first.problem is not None else None
