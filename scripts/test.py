"""Lint, types and every test on a bare clone: `python scripts/test.py [--fast] [pytest arguments]`.

Makes its own virtual environment with the `convert` and `test` extras. `--fast` leaves the slow
tests out; `--here` uses the Python that runs this script instead of making an environment.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from _environment import ROOT, SetupError, ensure_environment, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave the slow tests out")
    parser.add_argument("--here", action="store_true", help="use the Python that runs this script")
    options, pytest_arguments = parser.parse_known_args()

    started = time.perf_counter()
    try:
        python = (
            Path(sys.executable)
            if options.here
            else ensure_environment(ROOT / ".venv-test", "convert,test")
        )
    except SetupError as error:
        print(f"test: {error}", file=sys.stderr)
        return 1
    selection = ["-m", "not slow"] if options.fast else []
    parts = {
        "environment": time.perf_counter() - started,
        "lint": _timed(python, "scripts/lint.py"),
    }
    # torch's training and OpenVINO do not share a process well: each group has one of its own.
    groups = {
        "runtime": ["tests/runtime"],
        "training": ["tests/scripts"],
        "tests": ["tests", "--ignore=tests/runtime", "--ignore=tests/scripts"],
    }
    for name, where in groups.items():
        parts[name] = _timed(
            python, "-m", "pytest", "--durations=5", *where, *selection, *pytest_arguments
        )
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()), file=sys.stderr)
    return 0


def _timed(python: Path, *arguments: str) -> float:
    started = time.perf_counter()
    status = run(python, *arguments)
    if status:
        sys.exit(status)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
