"""Make a picture from a prompt on a bare clone: `python scripts/demo.py ["a prompt"]`.

Needs nothing but Python 3.10 to 3.13. Makes a virtual environment with the runtime only (no torch),
then runs `sdvino generate` with the bundled demo model. The second run takes seconds.
"""

from __future__ import annotations

import argparse
import sys
import time

from _environment import ROOT, SetupError, ensure_environment, run

PROMPT = "a big red star on a blue background"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"default: {PROMPT!r}")
    parser.add_argument("--seed", default="7", help="the same seed gives the same picture")
    options = parser.parse_args()

    started = time.perf_counter()
    try:
        python = ensure_environment(ROOT / ".venv")
    except SetupError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    ready = time.perf_counter()
    output = ROOT / "outputs" / "demo.png"
    output.parent.mkdir(exist_ok=True)
    arguments = ["generate", options.prompt, "--seed", options.seed, "-o", str(output), "--timings"]
    status = run(python, "-m", "sdvino", *arguments)
    done = time.perf_counter()
    print(f"environment {ready - started:.1f} s, picture {done - ready:.1f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
