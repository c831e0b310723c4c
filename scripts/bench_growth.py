"""How the cost of pictures grows with how many, how large and in how many steps.

    python scripts/bench_growth.py --work FOLDER [-m MODEL] [--output docs]
        [--pictures 1,2,4,8,16] [--sizes 256,384,512,768,1024] [--steps 1,2,5,10,20,50]
        [--axes size,steps] [--at 512,4]

Around one point (--at SIDE,STEPS, one picture) each of the three is varied alone, every measurement
in a fresh process of sdvino's. Prints seconds (without loading), peak memory and the exponent of
the growth, fitted in logarithms; with --output writes growth.md, .json and .png. FOLDER keeps the
journal: when this is stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from bench_machine import ROOT, about_machine, folder_bytes, machine_line
from bench_plots import plot_growth
from bench_record import Journal, MeasureError, Progress, make_key, run_job, source_stamp
from bench_tables import Growth, fit_growth
from bench_worker import Job

from sdvino.errors import SdvinoError
from sdvino.folder.hub import resolve_model
from sdvino.folder.index import ModelFolder

AXES = ("pictures", "size", "steps")
#: What one unit of an axis is called.
UNITS = {"pictures": "picture", "size": "pixel of the side", "steps": "step"}


@dataclass(frozen=True, slots=True)
class Point:
    """A request that is measured."""

    pictures: int
    size: int
    steps: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request took: seconds without loading, peak memory in bytes."""

    seconds: float
    peak: int


def plan(base: Point, axes: dict[str, Sequence[int]]) -> dict[str, list[Point]]:
    """Return the points of each axis: ``base`` with that one number varied, ascending."""
    return {
        axis: [replace(base, **{axis: value}) for value in sorted(set(values))]
        for axis, values in axes.items()
    }


def job_of(point: Point, folder: Path, guidance: float, cache: Path) -> Job:
    """Return what a worker is to do for one point."""
    return Job(
        runner="sdvino",
        folder=str(folder),
        result="",
        width=point.size,
        height=point.size,
        steps=point.steps,
        images=point.pictures,
        guidance=guidance,
        cache=str(cache),
    )


def describe(axis: str, growth: Growth) -> str:
    """Return a fit in words."""
    law = f"time ~ {axis}^{growth.exponent:.2f}"
    if axis == "size":  # no straight line
        return law
    return f"{law}\n{growth.fixed:.2f} s + {growth.each:.2f} s a {UNITS[axis]}"


def table(points: dict[str, list[Point]], costs: dict[Point, Cost]) -> str:
    """Return the measurements and the fits in Markdown."""
    lines = []
    for axis, along in points.items():
        fit = describe(axis, fit_of(axis, along, costs)).replace("\n", "; ")
        lines += [
            f"**{axis}**: {fit}",
            "",
            f"| {axis} | seconds | peak memory, GB |",
            "|---|---|---|",
        ]
        for point in along:
            cost = costs[point]
            lines.append(f"| {getattr(point, axis)} | {cost.seconds:.2f} | {cost.peak / 1e9:.2f} |")
        lines.append("")
    return "\n".join(lines)


def fit_of(axis: str, along: Sequence[Point], costs: dict[Point, Cost]) -> Growth:
    """Return how the seconds grow along one axis."""
    return fit_growth([(getattr(point, axis), costs[point].seconds) for point in along])


def measure(
    points: dict[str, list[Point]], folder: Path, guidance: float, journal: Journal
) -> dict[Point, Cost]:
    """Measure every point that the journal does not hold; raises MeasureError."""
    wanted = list(dict.fromkeys(point for along in points.values() for point in along))
    depends = {
        "machine": about_machine(),
        "sdvino": source_stamp((ROOT / "sdvino").rglob("*.py")),
        "bytes": folder_bytes(folder),
        "guidance": guidance,
    }
    progress = Progress([str(point) for point in wanted])
    costs = {}
    for point in wanted:
        name = f"{point.pictures} x {point.size} in {point.steps}"
        key = make_key("growth", folder.name, name, depends)
        took = None
        if key not in journal.entries:
            progress.begin(f"{point.pictures} pictures of {point.size}, {point.steps} steps")
            started = time.perf_counter()
            cache = journal.path.parent / "cache" / "growth"
            journal.add(run_job(job_of(point, folder, guidance, cache), {}, key))
            took = time.perf_counter() - started
        progress.end(took)
        entry = journal.entries[key]
        costs[point] = Cost(entry.measured.pictures[0], entry.peak)
    return costs


def write(
    output: Path,
    model: str,
    points: dict[str, list[Point]],
    costs: dict[Point, Cost],
    guidance: float,
    base: Point,
) -> None:
    """Write growth.md, growth.json and growth.png."""
    output.mkdir(parents=True, exist_ok=True)
    about = about_machine()
    growth = {axis: fit_of(axis, along, costs) for axis, along in points.items()}
    value: dict[str, Any] = {
        "model": model,
        "machine": about,
        "date": date.today().isoformat(),
        "guidance": guidance,
        "exponents": {axis: fit.exponent for axis, fit in growth.items()},
        "points": [
            {"axis": axis, **asdict(point), **asdict(costs[point])}
            for axis, along in points.items()
            for point in along
        ],
    }
    (output / "growth.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    document = (
        f"# How cost grows\n\n{model}, guidance {guidance:g}, printed by `python"
        f" scripts/bench_growth.py` on {value['date']}; {machine_line(about)}. Around one"
        f" picture of {base.size} x {base.size} in {base.steps} steps, one number is varied at a"
        " time; seconds without loading; each point a fresh process.\n\n"
        f"![growth](growth.png)\n\n{table(points, costs)}"
    )
    (output / "growth.md").write_text(document, encoding="utf-8")
    panels = [
        (
            axis,
            [(getattr(p, axis), costs[p].seconds, float(costs[p].peak)) for p in along],
            describe(axis, growth[axis]),
        )
        for axis, along in points.items()
    ]
    plot_growth(panels, output / "growth.png")


def _numbers(text: str) -> list[int]:
    values = [int(word) for word in text.split(",")]
    if len(set(values)) < 2 or min(values) < 1:
        raise argparse.ArgumentTypeError("give at least two whole numbers from 1 up, by commas")
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps the journal")
    parser.add_argument("-m", "--model", help="default: the bundled demo model")
    parser.add_argument("--pictures", type=_numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--sizes", type=_numbers, default=[256, 384, 512, 768, 1024])
    parser.add_argument("--steps", type=_numbers, default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--at", type=_numbers, default=[512, 4], metavar="SIDE,STEPS")
    parser.add_argument("--axes", default=",".join(AXES), help="which of the three to vary")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--output", type=Path, help="folder for growth.md, .json and .png")
    options = parser.parse_args(arguments)
    base = Point(1, *options.at[:2])
    axes = {"pictures": options.pictures, "size": options.sizes, "steps": options.steps}
    chosen = options.axes.split(",")
    if not set(chosen) <= set(AXES):
        parser.error(f"--axes takes {', '.join(AXES)}, by commas")
    points = plan(base, {axis: axes[axis] for axis in AXES if axis in chosen})
    try:
        folder = ModelFolder.open(resolve_model(options.model, offline=True))
        journal = Journal(options.work / "growth.jsonl")
        costs = measure(points, folder.path, options.guidance, journal)
    except SdvinoError as error:
        print(f"bench_growth: {error}", file=sys.stderr)
        return error.exit_code
    except MeasureError as error:
        print(f"bench_growth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; what was measured is kept: the same command goes on.", file=sys.stderr)
        return 130
    print(table(points, costs))
    if options.output is not None:
        write(options.output, folder.name, points, costs, options.guidance, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
