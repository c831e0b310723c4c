"""The curves of a training: loss.jsonl, a line for a few iterations each, and loss.png of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_FILE = "loss.jsonl"
PLOT_FILE = "loss.png"
#: Iterations in a line of the log.
_EVERY = 10
#: What a line holds beside losses.
_NO_LOSS = ("iteration", "seconds", "rate", "gradient")


class Curve:
    """Adds up the losses of iterations, and writes the mean of some down."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._lines: list[str] = []

    def begin_at(self, iteration: int) -> None:
        """Forget what was written down of iterations after ``iteration``: they are done again."""
        kept = [line for line in read_log(self._path) if line["iteration"] <= iteration]
        self._lines = [json.dumps(line) for line in kept]

    def add(
        self, losses: Mapping[str, float], *, iteration: int, rate: float, seconds: float
    ) -> None:
        """Take in the ``losses`` of the ``iteration`` that was done last."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if iteration % _EVERY == 0:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            line = {"iteration": iteration, "seconds": round(seconds, 1), "rate": rate}
            self._lines.append(json.dumps(line | {k: float(f"{v:.6g}") for k, v in means.items()}))
            self._sums, self._counts = {}, {}

    def write(self) -> None:
        """Write the log."""
        part = self._path.with_name(self._path.name + ".part")
        part.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")
        part.replace(self._path)

    def draw(self) -> None:
        """Draw the curves; without matplotlib there are none."""
        try:
            from sdvino.compress.plots import plot_losses

            lines: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
            last = lines[-1] if lines else {}
            names = [name for name in last if name not in _NO_LOSS]
            plot_losses(
                {
                    name: [(line["iteration"], line[name]) for line in lines if name in line]
                    for name in names
                },
                self._path.with_name(PLOT_FILE),
            )
        except ImportError:
            return


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log; none where there is no log, or what is left of a damaged one."""
    lines: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        lines.extend(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    return [line for line in lines if isinstance(line, dict) and "iteration" in line]
