"""Lint, types and every test on a bare clone: `python scripts/test.py [--fast] [pytest arguments]`.

Makes its own virtual environment with the `train` and `test` extras. `--fast` leaves the slow
tests out; `--here` uses the Python that runs this script instead of making an environment. Groups
of tests run side by side, each on its own share of the processor's cores; `--jobs` says how many.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from _environment import ROOT, SetupError, ensure_environment

#: Files of tests/convert that train or share models in miniature: nearly half of its time.
WHOLE = tuple(
    f"tests/convert/test_{name}.py" for name in ("interop", "quantized_families", "passes")
)
ALONE = ("compress", "train", "scripts")
#: Name -> what Python is given; what takes longest first. torch's training and OpenVINO do not
#: share a process well, so that each group has one of its own.
GROUPS: dict[str, tuple[str, ...]] = {
    "convert": ("tests/convert", *(f"--ignore={path}" for path in WHOLE)),
    "whole": WHOLE,
    "others": (
        "tests",
        *(f"--ignore=tests/{n}" for n in ("convert", "compress", "train", "scripts")),
    ),
    "compress": ("tests/compress",),
    "train": ("tests/train",),
    "scripts": ("tests/scripts",),
}
MOST_JOBS = 2


class Runner:
    """Runs groups side by side; what a group says has its name in front."""

    def __init__(self, python: Path, jobs: int) -> None:
        self.python = python
        self.shares = shares_of(usable_cores(), jobs)
        self.failed = False
        self.seconds: dict[str, float] = {}
        self._waiting: list[tuple[str, list[str]]] = []
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    def run(self, commands: Sequence[tuple[str, list[str]]]) -> bool:
        """Run every command and return whether all of them passed; after a failure, no more."""
        self._waiting = list(commands)
        workers = [threading.Thread(target=self._work, args=(share,)) for share in self.shares]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self._waiting.clear()
            for process in self._running:
                process.terminate()
            raise
        return not self.failed

    def _work(self, share: Sequence[int]) -> None:
        while not self.failed:
            with self._lock:
                if not self._waiting:
                    return
                name, arguments = self._waiting.pop(0)
            started = time.perf_counter()
            process = subprocess.Popen(
                [*on_cores(share), str(self.python), *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(max(1, len(share)))},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            self._running.append(process)
            for line in process.stdout or ():
                print(f"{name:9}| {line}", end="", flush=True)
            self.seconds[name] = time.perf_counter() - started
            if process.wait() != 0:
                self.failed = True
                print(f"{name:9}| ended with status {process.returncode}", flush=True)


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use; none where nobody tells."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def shares_of(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """Return the cores of each job: all of them once, or equal parts. Unknown cores make one."""
    count = max(1, min(jobs, len(cores)))
    size = len(cores) // count
    return [list(cores[i * size : (i + 1) * size]) for i in range(count)]


def on_cores(share: Sequence[int]) -> list[str]:
    """Return what to write before a command so that it stays on ``share``."""
    if not share or usable_cores() == list(share) or shutil.which("taskset") is None:
        return []
    return ["taskset", "-c", ",".join(map(str, share))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave the slow tests out")
    parser.add_argument("--here", action="store_true", help="use the Python that runs this script")
    parser.add_argument("--jobs", type=int, default=MOST_JOBS, help="groups run side by side")
    options, pytest_arguments = parser.parse_known_args()

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell starts what runs behind it so, and tests of Ctrl-C would wait for ever.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.perf_counter()
    try:
        python = (
            Path(sys.executable)
            if options.here
            else ensure_environment(ROOT / ".venv-test", "train,test")
        )
    except SetupError as error:
        print(f"test: {error}", file=sys.stderr)
        return 1
    made = time.perf_counter() - started
    pytest = ["-m", "pytest", "--durations=5", "-p", "no:cacheprovider"]
    selection = [*(["-m", "not slow"] if options.fast else []), *pytest_arguments]
    commands = [(name, [*pytest, *where, *selection]) for name, where in GROUPS.items()]
    commands.append(("lint", ["scripts/lint.py"]))
    runner = Runner(python, options.jobs)
    try:
        passed = runner.run(commands)
    except KeyboardInterrupt:
        return 130
    parts = {"environment": made, **runner.seconds}
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()), file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
