"""Print what fewer evaluations to calibrate on cost: PSNR to fp16 and pictures that are right.

    python scripts/measure_samples.py --prompts 200 --record build/samples

The recipe int8 of the demo model, its UNet's activations measured on so many of the evaluations
that draw the calibration pictures; see scripts/measure_compression.py, whose options these are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from measure_compression import REFERENCE, parse, run, scratch_folder, table

from sdvino.compress.recipe_file import to_toml
from sdvino.compress.recipes import get_recipe

#: Evaluations, and the trajectories that they are of; None: all of as many as the UNet's size asks.
COUNTS: tuple[tuple[int | None, int | None], ...] = (
    (2, 1),
    (6, 2),
    (16, 4),
    (64, 12),
    (None, 6),
    (None, 12),
    (None, None),
)


def recipes(folder: Path) -> list[str]:
    """Write int8 with each of the counts to ``folder``; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for samples, trajectories in COUNTS:
        name = f"{samples or 'all'} of {trajectories or 'the default'}"
        recipe = get_recipe("int8")
        calibration = replace(recipe.calibration, samples=samples, trajectories=trajectories)
        path = folder / f"int8 {name}.toml"
        path.write_text(
            to_toml(replace(recipe, name=f"int8 {name}", calibration=calibration)), encoding="utf-8"
        )
        files.append(str(path))
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--record", type=Path, help="keep models and pictures here and go on")
    given = parser.parse_args(arguments)
    with scratch_folder(given.record) as scratch:
        options = parse([REFERENCE, *recipes(scratch / "recipes"), "--prompts", str(given.prompts)])
        results = run(options, scratch, lambda line: print(line, file=sys.stderr, flush=True))
    print(table([replace(result, recipe=Path(result.recipe).stem) for result in results]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
