"""Where the time of one `sdvino generate` goes, from process start to file.

`python scripts/bench_startup.py [-m FOLDER] [--runs N]` prints medians of fresh processes: an empty
Python, the imports, `--help`, and a whole picture, with the first start (nothing compiled before)
apart. What the last line leaves over is time that neither OpenVINO nor the model explains.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROMPT = "a big red star on a blue background"


def seconds(command: Sequence[str]) -> tuple[float, str]:
    """Run a command; return its seconds and what it wrote to stderr."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stderr


def median(command: Sequence[str], runs: int) -> float:
    """Return the median seconds of ``runs`` fresh processes."""
    return statistics.median(seconds(command)[0] for _ in range(runs))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    python = sys.executable
    model = [] if options.model is None else ["-m", options.model]
    with tempfile.TemporaryDirectory() as scratch:
        generate = [
            *(
                python,
                "-m",
                "sdvino",
                "generate",
                PROMPT,
                "--seed",
                "7",
                "--timings",
                "--overwrite",
            ),
            *("-o", str(Path(scratch) / "out.png"), "--cache-dir", str(Path(scratch) / "cache")),
            *model,
        ]
        rows = {
            "empty Python": median([python, "-c", "pass"], options.runs),
            "import sdvino": median([python, "-c", "import sdvino"], options.runs),
            "sdvino --help": median([python, "-m", "sdvino", "--help"], options.runs),
            "import openvino": median([python, "-c", "import openvino"], options.runs),
            "first picture": seconds(generate)[0],
        }
        warm = [seconds(generate) for _ in range(options.runs)]
    rows["picture"] = statistics.median(total for total, _ in warm)
    parts = {
        name: statistics.median(_part(name, text) for _, text in warm)
        for name in ("load", "text", "denoise", "decode")
    }
    for name, value in rows.items():
        print(f"{name:24} {value:6.2f} s")
    for name, value in parts.items():
        print(f"  of which {name:13} {value:6.2f} s")
    left = rows["picture"] - rows["import openvino"] - sum(parts.values())
    print(f"{'neither of these':24} {left:6.2f} s")
    return 0


def _part(name: str, text: str) -> float:
    found = re.search(rf"^{name} +([\d.]+) s", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"--timings does not say how long {name} took: {text!r}")
    return float(found[1])


if __name__ == "__main__":
    sys.exit(main())
