"""Give sdvino's commands hostile input, and tell every wrong answer.

    python scripts/fuzz.py [--seconds 60] [--inputs N] [--seed 0] [--only KIND ...] [--jobs 1]
                           [--keep FOLDER] [--corpus FILE [--record]]
    python scripts/fuzz.py --replay KIND:SEED:NUMBER [--keep FOLDER]

Each input is determined by its kind, the seed and its number, and runs the real command in a child
of this process, without a network. A table goes to stdout, then a line for each wrong answer; the
exit status is 1 when there was one. The inputs of the corpus run first. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

# Before anything is imported that reads them: one thread, no network, nothing told to anybody.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz_child import Child, Job, Limits, Result, run
from fuzz_draw import Case
from fuzz_files import remove, snapshot
from fuzz_inputs import KINDS, build, sequence
from fuzz_templates import Templates, make
from fuzz_verdicts import CLASSES, Fault, Snapshot, judge, place_of

_MODULES_FILE = "modules.txt"
_SAY_SECONDS = 5.0
#: What each real conversion takes is imports in its workers, more of them on a slow machine.
LIMITS = Limits()
CONVERSION = replace(LIMITS, seconds=240.0, cpu_seconds=120, waiting_seconds=20.0)


@dataclass(frozen=True, slots=True)
class Known:
    """A fault of OpenVINO itself: a graph that passes every check, and still takes it down."""

    openvino: str
    kind: str
    #: Words of the fault's line.
    words: str
    why: str


#: Only what was proved with OpenVINO alone.
KNOWN: tuple[Known, ...] = ()


@dataclass(slots=True)
class Tally:
    """What was run and what was wrong."""

    inputs: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[Case, Fault]] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """Return kinds by classes, as text."""
        counts = Counter((case.kind, fault.kind) for case, fault in self.faults)
        shown = [name for name in CLASSES if any(kind == name for _, kind in counts)]
        rows = [["kind", "inputs", *shown]]
        for kind in (name for name in KINDS if self.inputs[name]):
            numbers = (counts[kind, name] for name in shown)
            rows.append([kind, str(self.inputs[kind]), *(str(n) if n else "." for n in numbers)])
        sums = (sum(counts[kind, name] for kind in KINDS) for name in shown)
        rows.append(["together", str(self.inputs.total()), *map(str, sums)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        wrong = len({case.name for case, _ in self.faults})
        lines.append(f"{self.inputs.total()} inputs, {wrong} wrong, {self.seconds:.0f} s")
        return "\n".join(lines)

    def lines(self) -> list[str]:
        """Return a line for each wrong answer, what is alike side by side."""
        found = sorted(self.faults, key=lambda pair: (pair[1].kind, pair[1].why))
        return [
            f"{fault.kind}: {printable(fault.why)}; {printable(', '.join(case.changes))[:160]};"
            f" --replay {case.name}"
            for case, fault in found
        ]


def printable(text: str) -> str:
    """Return ``text`` with control characters as escapes, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_known(fault: Fault) -> bool:
    """Tell whether a fault is one of OpenVINO's own that stand in the table."""
    import openvino as ov

    version = str(ov.get_version())
    return any(
        known.kind == fault.kind and known.words in fault.why and version.startswith(known.openvino)
        for known in KNOWN
    )


@dataclass(slots=True)
class Running:
    """An input whose command runs."""

    case: Case
    child: Child
    before: Snapshot
    room: Path


class Fuzzer:
    """Runs inputs, some at a time, under one scratch folder."""

    def __init__(self, scratch: Path, command: Callable[[Sequence[str]], int]) -> None:
        self.scratch = scratch
        self.templates = Templates(scratch / "templates")
        self.command = command
        self.tally = Tally()
        self.keep: Path | None = None
        self._running: list[Running] = []
        self._count = 0

    def run(self, cases: Iterator[tuple[str, int, int]], jobs: int) -> Iterator[Case]:
        """Run (kind, seed, number) after the other until there are no more; yield what is done."""
        started = time.monotonic()
        try:
            while True:
                while len(self._running) < jobs and (wanted := next(cases, None)) is not None:
                    self._start(*wanted)
                if not self._running:
                    return
                time.sleep(0.004)
                for running in list(self._running):
                    result = running.child.poll()
                    if result is not None:
                        self._running.remove(running)
                        self._finish(running, result)
                        self.tally.seconds = time.monotonic() - started
                        yield running.case
        finally:
            for running in self._running:
                running.child.kill()

    def _start(self, kind: str, seed: int, number: int) -> None:
        self._count += 1
        room = self.scratch / f"input-{self._count}"
        case = build(kind, seed, number, room, self.templates)
        if case.job.user is not None and sys.platform != "win32":
            for path in (room, *room.rglob("*")):
                os.chown(path, case.job.user, -1, follow_symlinks=False)
        child = Child(case.job, self.command, limits_of(case.job))
        self._running.append(Running(case, child, snapshot(room), room))

    def _finish(self, running: Running, result: Result) -> None:
        case, room = running.case, running.room
        faults = judge(case.expected, result, room, running.before)
        self.tally.inputs[case.kind] += 1
        for fault in faults:
            why = fault.why.replace(str(room), "")
            if fault.kind == "unexpected":
                why = f"{self._place(case)}: {why}"
            fault = replace(fault, why=why)
            if not is_known(fault):
                self.tally.faults.append((case, fault))
        if faults and self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(room, self.keep / case.name.replace(":", "-"))
        remove(room)

    def _place(self, case: Case) -> str:
        """Run an input again with --debug; return where it raises."""
        room = self.scratch / "again"
        again = build(case.kind, case.seed, case.number, room, self.templates).job
        job = replace(again, arguments=[*again.arguments, "--debug"])
        result = run(job, self.command, limits_of(job))
        remove(room)
        return place_of(result.stderr.decode("utf-8", "replace"))


def limits_of(job: Job) -> Limits:
    """Return the limits of a command; conversions that are no dry runs take longer."""
    real = job.arguments[0] == "convert" and "--dry-run" not in job.arguments
    return CONVERSION if real else LIMITS


def command_line(arguments: Sequence[str]) -> int:
    """Run sdvino's own."""
    from sdvino.cli.main import main

    return main(arguments)


def prepare(scratch: Path) -> None:
    """Make the templates in a child, and import here what it imported.

    Nothing is run here: OpenVINO's threads would be missing in every child.
    """

    def child(_: Sequence[str]) -> int:
        before = set(sys.modules)
        make(scratch / "templates")
        new = sorted(set(sys.modules) - before)
        (scratch / _MODULES_FILE).write_text("\n".join(new), encoding="utf-8")
        return 0

    # OpenVINO's converter would start a thread to report to its makers, and nothing else does.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    os.environ["HF_HOME"] = str(scratch / "hub")
    job = Job(["templates"], dict(os.environ), scratch, scratch / "prepared")
    result = run(job, child, Limits(seconds=600.0, cpu_seconds=600))
    if result.end != "done" or result.status:
        said = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError(f"The templates could not be made ({said[0] if said else result.end}).")
    for name in (scratch / _MODULES_FILE).read_text(encoding="utf-8").split():
        # Not all that stands in sys.modules can be imported by its name.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("An import has started a thread, which no child would have.")
    gc.collect()
    gc.freeze()


def read_corpus(path: Path | None, kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return kind, seed and number of each line."""
    if path is None or not path.is_file():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(e["kind"], e["seed"], e["number"]) for e in entries if e["kind"] in kinds]


def record(path: Path, faults: Sequence[tuple[Case, Fault]]) -> None:
    """Add to the corpus what it does not hold."""
    held = set(read_corpus(path, tuple(KINDS)))
    with path.open("a", encoding="utf-8") as file:
        for case, fault in faults:
            if (case.kind, case.seed, case.number) not in held:
                held.add((case.kind, case.seed, case.number))
                entry: dict[str, Any] = {"kind": case.kind, "seed": case.seed}
                entry |= {"number": case.number, "why": f"{fault.kind}: {printable(fault.why)}"}
                file.write(json.dumps(entry) + "\n")


def replay(fuzzer: Fuzzer, name: str) -> None:
    """Run one input and show everything about it."""
    kind, seed, number = name.split(":")
    room = fuzzer.scratch / "replay"
    case = build(kind, int(seed), int(number), room, fuzzer.templates)
    print("sdvino", *(printable(word)[:200] for word in case.job.arguments))
    print(*(f"  {printable(change)}" for change in case.changes), sep="\n")
    remove(room)
    outputs: list[tuple[str, bytes]] = []
    finish = fuzzer._finish

    def show(running: Running, result: Result) -> None:
        print(f"{result.end}, status {result.status}, {result.seconds:.1f} s")
        outputs.extend((("stdout", result.stdout), ("stderr", result.stderr)))
        outputs.append(("stack", result.stack.encode()))
        finish(running, result)

    fuzzer._finish = show  # type: ignore[method-assign]
    for _ in fuzzer.run(iter([(kind, int(seed), int(number))]), 1):
        pass
    for title, output in outputs:
        text = "\n".join(map(printable, output[:8000].decode("utf-8", "replace").splitlines()))
        print(f"--- {title}", text, sep="\n")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--inputs", type=int, help="how many, instead; after the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--replay", metavar="KIND:SEED:NUMBER", help="run and show one input")
    parser.add_argument("--jobs", type=int, default=1, help="inputs side by side")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what was wrong here")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="inputs to begin with")
    parser.add_argument("--record", action="store_true", help="add what is wrong to the corpus")
    return parser.parse_args(arguments)


def _wanted(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield the corpus, then inputs until the time is up or there are enough."""
    yield from read_corpus(options.corpus, options.only)
    until = time.monotonic() + options.seconds
    for count, (kind, number) in enumerate(sequence(options.only)):
        over = time.monotonic() > until if options.inputs is None else count >= options.inputs
        if over:
            return
        yield kind, options.seed, number


def _go(fuzzer: Fuzzer, options: argparse.Namespace) -> None:
    """Run what is wanted and say, now and then, how far it is."""
    started = said = time.monotonic()
    for case in fuzzer.run(_wanted(options), options.jobs):
        now = time.monotonic()
        if now - said > _SAY_SECONDS:
            said = now
            left = f"{max(0.0, options.seconds - (now - started)):.0f} s left"
            done = fuzzer.tally.inputs.total()
            left = left if options.inputs is None else f"{max(0, options.inputs - done)} left"
            wrong = len(fuzzer.tally.faults)
            print(f"{done} inputs, {wrong} faults, {left}, {case.name}", file=sys.stderr)


def _cancel(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; 1 when something was wrong."""
    options = _arguments(arguments)
    if not sys.platform.startswith("linux"):
        print("fuzz: this runs on Linux only: it needs fork and /proc.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _cancel)
    scratch = Path(tempfile.mkdtemp(prefix="sdvino-fuzz-"))
    scratch.chmod(0o711)  # some inputs run as nobody
    fuzzer = Fuzzer(scratch, command_line)
    fuzzer.keep = options.keep
    cancelled = False
    try:
        prepare(scratch)
        if options.replay is not None:
            replay(fuzzer, options.replay)
        else:
            _go(fuzzer, options)
    except KeyboardInterrupt:
        cancelled = True
    except RuntimeError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    finally:
        remove(scratch)
    print(fuzzer.tally.table(), *fuzzer.tally.lines(), sep="\n")
    if options.record and options.corpus is not None:
        record(options.corpus, fuzzer.tally.faults)
    return 130 if cancelled else int(bool(fuzzer.tally.faults))


if __name__ == "__main__":
    sys.exit(main())
