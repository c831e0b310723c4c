"""Kill sdvino at random moments, and look at what is left: `python scripts/kill.py`.

Real processes of the real command line get SIGKILL or SIGTERM, at random. `--convert N`: so many
kills hit conversions; the same command is started again, and killed again, until it may end, and
then every file must be that of an undisturbed conversion, with nothing beside them. `--generate N`:
so many hit the drawing of pictures; those in the folder must be whole, a normal start must clear
the cache of what the dead left, and must draw what it draws undisturbed. A SIGTERM must end with
status 130 and a sentence, and no process may outlive the one that was killed. The same `--seed`
chooses the same moments, as far as a machine runs evenly. Linux only.
A table goes to stdout; the exit status is 1 when something was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kill_runs import (
    POLL_SECONDS,
    ROOT,
    SIGNALS,
    Found,
    Look,
    beside,
    choose_moment,
    differences,
    digests,
    kill,
    not_whole,
    started,
    undisturbed,
    unfinished,
    wait_for,
)

from sdvino.convert.api import look_ahead, make_request
from sdvino.convert.state import work_path
from sdvino.runtime.cache import _YOUNG_SECONDS

#: Kills that one conversion gets before it may end.
FEWEST, MOST = 2, 5
DRAW = ("generate", "a red circle on a blue background", "--seed", "7", "--steps", "8", "-n", "2")
DRAWING = ("start", "compiling", "drawing", "writing", "saved")


#: Sentences about what was wrong that are printed.
MOST_LINES = 40


def conversion_phase(target: Path, steps: Sequence[str], since: float) -> str:
    """Return what a conversion to ``target`` does now: a step, `start` before, `end` after them.

    ``since``: when it was started; what an earlier one left in tmp/ is older.
    """
    work = work_path(target)
    try:
        done = json.loads((work / "state.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError):
        return "end" if target.is_dir() else "start"
    step = next((step for step in steps if step not in done), "end")
    if step == "end":
        return step
    try:
        begun = (work / "tmp" / step.replace(" ", "-")).stat().st_mtime >= since
    except OSError:
        begun = False
    return step if begun else "start"


def drawing_phase(cache: Path, pictures: Path, models: int) -> str:
    """Return what a run that draws does now; ``models``: how many the cache holds in the end."""
    if unfinished(pictures):
        return "writing"
    if any(pictures.iterdir()):
        return "saved"
    try:
        there = [path.name for path in cache.iterdir() if path.is_dir()]
    except OSError:
        return "start"
    if len([name for name in there if not name.startswith(".")]) >= models:
        return "drawing"
    return "compiling" if there else "start"


class Conversions:
    """Kills conversions of one source by one recipe."""

    def __init__(self, source: Path, recipe: str, scratch: Path, found: Found) -> None:
        """Convert undisturbed, to compare with and to know how long what takes."""
        self._words = ["convert", str(source), "--recipe", recipe, "--no-gate"]
        self._scratch, self._found = scratch, found
        target = self._target("undisturbed")
        ahead = look_ahead(make_request(source, recipe=recipe), target)
        self._steps = [needs.step.name for needs in ahead.steps]
        self._order = ["start", *self._steps, "end"]
        words = [*self._words, str(target)]
        timed = undisturbed(words, scratch, self._look(target), found)
        #: Phase -> seconds; some are too short to be seen.
        self._phases = {phase: timed.get(phase, POLL_SECONDS) for phase in self._order}
        self._expected = digests(target)

    def kill_some(self, most: int, rng: random.Random, name: str, progress: Progress) -> None:
        """Kill one conversion some times, ``most`` at most; let it end, and compare."""
        target = self._target(name)
        for _ in range(min(most, rng.randint(FEWEST, MOST))):
            if self._is_done(target):
                break
            self._attempt(target, rng)
            progress.show(self._found)
        if not self._is_done(target):
            with started([*self._words, str(target)], self._scratch) as run:
                self._note_end(run.end())
        self._found.note_differences(differences(self._expected, digests(target)), name)
        self._found.note_left(beside(target), f"beside {name}")

    def _attempt(self, target: Path, rng: random.Random) -> None:
        """Start a conversion, or continue it, and kill it on its way."""
        try:
            state = (work_path(target) / "state.json").read_text(encoding="utf-8")
            done = set(json.loads(state)["steps"])
        except OSError:
            done = set()
        left = {phase: seconds for phase, seconds in self._phases.items() if phase not in done}
        phase, offset = choose_moment(left, rng)
        number = rng.choice(SIGNALS)
        with started([*self._words, str(target)], self._scratch) as run:
            now = wait_for(run, self._look(target), self._order, phase, offset)
            if now is None:
                self._found.spared += 1
                self._note_end(run.end())
                return
            kill(run, now, number, self._found)
        if target.is_dir() and (lines := differences(self._expected, digests(target))):
            self._found.wrong.append(f"a target stood before it was whole: {lines[0]}")

    def _note_end(self, end: tuple[int | None, str]) -> None:
        status, said = end
        if status != 0:
            text = f"a conversion that was continued failed with status {status}: {said[-300:]}"
            self._found.wrong.append(text)

    def _is_done(self, target: Path) -> bool:
        """Tell whether it was killed when there was nothing left to do."""
        return target.is_dir() and not work_path(target).exists()

    def _look(self, target: Path) -> Look:
        since = time.time()
        return lambda: conversion_phase(target, self._steps, since)

    def _target(self, name: str) -> Path:
        folder = self._scratch / name.replace(" ", "-")
        folder.mkdir()
        return folder / "model"


class Drawings:
    """Kills runs that draw pictures, with an empty cache and with a filled one."""

    def __init__(self, model: str | None, scratch: Path, found: Found) -> None:
        """Draw undisturbed, first with an empty cache."""
        self._words = [*DRAW, *([] if model is None else ["-m", model])]
        self._scratch, self._found = scratch, found
        self._cache = scratch / "cache"
        pictures = self._folder("undisturbed")
        self._models = sys.maxsize  # so far nobody knows
        undisturbed(self._to(pictures), scratch, self._look(pictures), found)
        self._models = sum(path.is_dir() for path in self._cache.glob("[!.]*"))
        self._expected = digests(pictures)
        self._phases = {}
        for name in ("empty", "filled"):
            if name == "empty":
                shutil.rmtree(self._cache)
            folder = self._folder(name)
            timed = undisturbed(self._to(folder), scratch, self._look(folder), found)
            self._phases[name] = {phase: timed.get(phase, POLL_SECONDS) for phase in DRAWING}
            lines = differences(self._expected, digests(folder))
            found.wrong += [f"undisturbed, the cache {name}: {line}" for line in lines]

    def kill_one(self, rng: random.Random, name: str) -> None:
        """Kill one run, look at what it left, and start normally."""
        cache = rng.choice(["empty", "filled", "as it is"])
        if cache == "empty":
            shutil.rmtree(self._cache, ignore_errors=True)
        phase, offset = choose_moment(self._phases["empty" if cache == "empty" else "filled"], rng)
        number = rng.choice(SIGNALS)
        folder = self._folder(f"killed {name}")
        with started(self._to(folder), self._scratch) as run:
            now = wait_for(run, self._look(folder), DRAWING, phase, offset)
            if now is None:
                self._found.spared += 1
            else:
                kill(run, now, number, self._found)
        where = f"among the pictures of {name}, {number.name} in {now}"
        self._found.note_left(unfinished(folder), where)
        self._found.wrong += [f"{line}, {where}" for line in not_whole(folder, self._expected)]
        self._check_next(name)

    def _check_next(self, name: str) -> None:
        """Start normally: the pictures are right, and the cache is clean."""
        if self._cache.exists() and unfinished(self._cache):
            time.sleep(_YOUNG_SECONDS + 0.5)
        folder = self._folder(f"after {name}")
        with started(self._to(folder), self._scratch) as run:
            status, said = run.end()
        if status != 0:
            self._found.wrong.append(f"after {name}: status {status}, saying {said[-300:]!r}")
        self._found.note_differences(differences(self._expected, digests(folder)), f"after {name}")
        self._found.note_left(unfinished(self._cache), f"in the cache after {name}")

    def _look(self, pictures: Path) -> Look:
        return lambda: drawing_phase(self._cache, pictures, self._models)

    def _to(self, folder: Path) -> list[str]:
        return [*self._words, "-o", str(folder / "out.png")]

    def _folder(self, name: str) -> Path:
        folder = self._scratch / "pictures" / name.replace(" ", "-")
        folder.mkdir(parents=True)
        return folder


def table(title: str, found: Found) -> str:
    """Return where the kills were and what came of them, in Markdown."""
    lines = [f"| {title}: killed in | SIGKILL | SIGTERM |", "|---|---|---|"]
    for phase in dict.fromkeys(phase for phase, _ in found.kills):
        counts = (str(found.kills[phase, number.name]) for number in SIGNALS)
        lines += [f"| {phase} | {' | '.join(counts)} |"]
    lines += ["", "| | |", "|---|---|"]
    figures = {
        "kills": found.count,
        "ended before its kill came": found.spared,
        "SIGTERM before sdvino's first line": found.early,
        "ended afterwards and compared": found.compared,
        "differed from undisturbed": found.differed,
        "left where nothing may be": found.left,
        "processes that outlived theirs": found.orphans,
        "things wrong": len(found.wrong),
    }
    return "\n".join([*lines, *(f"| {what} | {figure} |" for what, figure in figures.items())])


class Progress:
    """Says on stderr how many kills are left, and for about how long."""

    def __init__(self, title: str, kills: int) -> None:
        self._title, self._kills, self._began = title, kills, time.monotonic()

    def show(self, found: Found) -> None:
        """Write a line."""
        done = found.count + found.spared
        each = (time.monotonic() - self._began) / max(1, done)
        left = each * max(0, self._kills - done) / 60
        text = f"{self._title}: {done} of {self._kills} kills, {len(found.wrong)} things wrong,"
        print(f"{text} about {left:.0f} min left", file=sys.stderr, flush=True)


def kill_conversions(
    kills: int, source: Path, recipe: str, scratch: Path, rng: random.Random
) -> Found:
    """Spend so many kills on conversions."""
    found = Found()
    print("converting undisturbed", file=sys.stderr, flush=True)
    conversions = Conversions(source, recipe, scratch, found)
    progress, number = Progress("conversions", kills), 0
    while (left := kills - found.count - found.spared) > 0:
        number += 1
        conversions.kill_some(left, rng, f"conversion {number}", progress)
    return found


def kill_drawings(kills: int, model: str | None, scratch: Path, rng: random.Random) -> Found:
    """Spend so many kills on drawing pictures."""
    found = Found()
    print("drawing undisturbed", file=sys.stderr, flush=True)
    drawings = Drawings(model, scratch, found)
    progress = Progress("pictures", kills)
    for number in range(1, kills + 1):
        drawings.kill_one(rng, f"drawing {number}")
        progress.show(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--convert", type=int, default=20, metavar="N", help="kills of conversions")
    parser.add_argument("--generate", type=int, default=20, metavar="N", help="kills of drawing")
    parser.add_argument("--seed", type=int, default=0, help="of the signals and the moments")
    parser.add_argument("--recipe", default="fp16")
    parser.add_argument("--source", type=Path, default=ROOT / "models" / "shapes-source")
    parser.add_argument("--model", help="what draws  [default: the bundled demo model]")
    parser.add_argument("--scratch", type=Path, help="where to work  [default: the system's]")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/environ").exists():
        parser.error("processes are found in /proc, which this system does not have; use Linux")
    results: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="kill-", dir=options.scratch) as name:
        scratch, rng = Path(name), random.Random(options.seed)
        if options.convert > 0:
            source = options.source.absolute()
            results["conversions"] = kill_conversions(
                options.convert, source, options.recipe, scratch, rng
            )
        if options.generate > 0:
            results["pictures"] = kill_drawings(options.generate, options.model, scratch, rng)
    print("\n\n".join(table(title, found) for title, found in results.items()))
    wrong = [line for found in results.values() for line in found.wrong]
    for line in wrong[:MOST_LINES]:
        print(f"wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
