"""Measurements in fresh processes, kept as they land: a benchmark that is stopped goes on later.

A journal holds one line of JSON for each measurement, under a key that says everything it depends
on: the machine, the instruction set, the libraries' versions, sdvino's own source. What has changed
since is measured again.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench_memory import has_proc, tree_highest
from bench_worker import Job, Measured

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().parent / "bench_worker.py"
SAMPLE_SECONDS = 0.1
_STOP_SECONDS = 10


class MeasureError(Exception):
    """A worker failed; the message holds its last words, or how long it was waited for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A measurement in the journal."""

    key: str
    #: How long the process took, start and end included.
    seconds: float
    #: Peak of the process tree in bytes.
    peak: int
    measured: Measured


class Journal:
    """The measurements so far, in a file to which each is added when it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                # The last line may be half-written.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = read_entry(json.loads(line))
                    self.entries[entry.key] = entry

    def add(self, entry: Entry) -> None:
        """Keep ``entry``, on disk at once."""
        self.entries[entry.key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if _cut_short(self.path) else "")
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_entry(value: Mapping[str, Any]) -> Entry:
    """Return the entry of a journal's line."""
    measured = dict(value["measured"])
    measured["pictures"] = tuple(measured["pictures"])
    return Entry(value["key"], value["seconds"], value["peak"], Measured(**measured))


def _cut_short(path: Path) -> bool:
    """Return whether the file's last line has no end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def make_key(*parts: object) -> str:
    """Return the key of a measurement that depends on ``parts``: readable, then a hash of all."""
    head = "/".join(str(part) for part in parts if isinstance(part, (str, int)))
    full = json.dumps(parts, sort_keys=True, default=str)
    return f"{head}/{hashlib.sha256(full.encode()).hexdigest()[:12]}"


def source_stamp(files: Iterable[Path]) -> str:
    """Return a hash of the texts of ``files``."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def run_job(
    job: Job, environment: Mapping[str, str], key: str, most_minutes: float = math.inf
) -> Entry:
    """Do ``job`` in a fresh process; raises MeasureError when it fails or takes too long.

    However this ends, Ctrl-C included, the process is gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="sdvino-bench-") as scratch:
        result, asked = Path(scratch) / "result.json", Path(scratch) / "job.json"
        job = replace(job, result=str(result), started=time.time())
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, str(WORKER), str(asked)]
        environment = {"PYTHONPATH": str(ROOT), **environment}
        seconds, peak = watch(command, environment, most_minutes)
        value = json.loads(result.read_text(encoding="utf-8"))
    measured = Measured(**{**value, "pictures": tuple(value["pictures"])})
    own = 0 if measured.peak is None else measured.peak
    # Without /proc, the worker's own word has to do; with it, the last look may be early.
    return Entry(key, seconds, max(peak, own), measured)


def watch(
    command: Sequence[str], environment: Mapping[str, str], most_minutes: float = math.inf
) -> tuple[float, int]:
    """Run ``command``; return its seconds and the peak of its process tree in bytes.

    Raises MeasureError when it fails or has not ended after ``most_minutes``.
    """
    started = time.perf_counter()
    peak, sampled = 0, has_proc()
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**_inherited(), "TOKENIZERS_PARALLELISM": "false", **environment},
        )
        try:
            while running.poll() is None:
                peak = max(peak, tree_highest(running.pid)) if sampled else 0
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(SAMPLE_SECONDS)
                if time.perf_counter() - started > 60 * most_minutes:
                    raise MeasureError(f"it was given up after {most_minutes:g} minutes.")
        finally:
            stop(running)
        if running.returncode:
            errors.seek(0)
            last = "\n".join(errors.read().splitlines()[-5:])
            raise MeasureError(f"its process ended with status {running.returncode}.\n{last}")
    return time.perf_counter() - started, peak


def _inherited() -> dict[str, str]:
    """Return this process's environment, but that Python keeps the bytecode of what it imports.

    Without, every start compiles all modules: what nobody's installation does.
    """
    return {name: of for name, of in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def compile_installed() -> None:
    """Compile what is installed here to bytecode, as pip does when it installs."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        compileall.compile_dir(folder, quiet=2, workers=0)
    compileall.compile_dir(ROOT / "sdvino", quiet=2)


def stop(running: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, first politely."""
    if running.poll() is None:
        running.terminate()
        try:
            running.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def seconds_left(done: Sequence[tuple[str, float]], pending: Sequence[str]) -> float | None:
    """Return how long ``pending`` will take, by what their like took; None before the first.

    Both name a kind of measurement; a kind that was not seen yet takes what all took on average.
    """
    if not done:
        return None
    overall = statistics.mean(seconds for _, seconds in done)
    by_kind: dict[str, list[float]] = {}
    for kind, seconds in done:
        by_kind.setdefault(kind, []).append(seconds)
    return sum(statistics.mean(by_kind.get(kind, [overall])) for kind in pending)


def as_time(seconds: float | None) -> str:
    """Return a duration as people read it."""
    if seconds is None:
        return "time left not known yet"
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{seconds:.0f} s left"
    return f"{minutes:.0f} min left" if minutes < 90 else f"{minutes / 60:.1f} h left"


class Progress:
    """Says on stderr what is being done, how far it is and how long the rest will take."""

    def __init__(self, kinds: Sequence[str], say: Callable[[str], None] | None = None) -> None:
        self._pending = list(kinds)
        self._total = len(kinds)
        self._done: list[tuple[str, float]] = []
        self._say = _to_stderr if say is None else say

    def begin(self, what: str) -> None:
        """Say that the next piece of work is ``what``."""
        number = self._total - len(self._pending) + 1
        left = as_time(seconds_left(self._done, self._pending))
        self._say(f"[{number}/{self._total}, {left}] {what}")

    def end(self, seconds: float | None) -> None:
        """Note that it took so long; None: it was there already."""
        kind = self._pending.pop(0)
        if seconds is not None:
            self._done.append((kind, seconds))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
