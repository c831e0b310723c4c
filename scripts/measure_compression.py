"""Print what each recipe costs the demo model: prompt adherence and PSNR, paired with fp16.

    python scripts/measure_compression.py --prompts 2000 --record build/compression

Converts models/shapes-source by every recipe (without the gate: this measures what it would have
to judge), draws the same prompts and seeds with each folder in f32, and writes docs/quality.md
and docs/quality.json. fp16 is the float model: its IR, uncompressed. With --record a run that was
stopped goes on where it was. Needs the convert extra.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from evaluate_demo import (
    GUIDANCE_SCALE,
    Share,
    Task,
    Verdicts,
    column,
    evaluate,
    held_out_tasks,
    paired_difference,
    runtime_backend,
    wilson,
)
from numpy.typing import NDArray
from PIL import Image

from sdvino import DeviceSettings, RunSettings
from sdvino.compress.similarity import psnr, ssim
from sdvino.convert.api import convert
from sdvino.folder.index import ModelFolder
from sdvino.inputs.files import sha256_of
from sdvino.settings import Precision

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "models" / "shapes-source"
REFERENCE = "fp16"
RECIPES = ("fp16", "int8-weights", "int8")
#: Pictures in one file of the record, and drawn by one call.
CHUNK = 64
#: What the issue asks for: (most points of adherence lost, least median PSNR).
GOALS = {"int8": (1.0, 30.0), "int8-weights": (0.5, 40.0)}
CAP = 99.0  # dB, for equal pictures


@dataclass(frozen=True)
class Result:
    """What was measured of one recipe; shares from 0 to 1, PSNR in dB."""

    recipe: str
    bytes: int
    adherence: Share
    #: Against the float model; None for the float model itself.
    difference: Share | None
    median_psnr: float | None
    tenth_psnr: float | None
    median_ssim: float | None


class Pictures:
    """Pictures of one run in compressed .npz files of CHUNK each, so that a run can go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, first: int, pictures: Sequence[Image.Image]) -> None:
        """Keep the pictures of the tasks from ``first`` on."""
        path = self.folder / f"{first:06}.npz"
        with path.with_suffix(".new").open("wb") as file:
            np.savez_compressed(file, pictures=np.stack([np.asarray(p) for p in pictures]))
        path.with_suffix(".new").replace(path)

    def load(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Give the first ``count`` pictures in order, uint8 [H, W, 3]."""
        given = 0
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as data:
                for picture in data["pictures"]:
                    if given < count:
                        yield picture
                    given += 1


def prepare(recipe: str, scratch: Path) -> Path:
    """Return the folder of ``recipe``, converting it unless an earlier run did."""
    folder = scratch / "models" / recipe.replace("/", "_").removesuffix(".toml")
    if not (folder / "sdvino.json").is_file():
        print(f"converting by {recipe} ...", file=sys.stderr, flush=True)
        convert(SOURCE, folder, recipe=recipe, gate=None, overwrite=folder.exists())
    return folder


def draw(
    folder: Path,
    tasks: Sequence[Task],
    pictures: Pictures,
    record: Path,
    steps: int,
    guidance_scale: float = GUIDANCE_SCALE,
    precision: Precision = "f32",
) -> Verdicts:
    """Draw and judge every task with ``folder``; pictures that an earlier run drew are kept.

    ``precision`` is what UNet and autoencoder compute floats in; the text encoder does in f32.
    """
    exact, own = DeviceSettings(precision="f32"), DeviceSettings(precision=precision)
    # One batch for both predictions: fewer, larger products are faster on small pictures.
    settings = RunSettings(
        default=exact, guidance_mode="batch", components={"unet": own, "vae": own}
    )
    generate = runtime_backend(folder, steps, guidance_scale, settings=settings)

    def drawn(prompts: list[str], seed: int) -> list[Image.Image]:
        found = generate(prompts, seed)
        pictures.save(seed, found)  # seeds are the numbers of the tasks
        return found

    key = {"model": weights_of(folder), "steps": steps, "guidance_scale": guidance_scale}
    if precision != "f32":
        key["precision"] = precision
    return evaluate(drawn, tasks, batch=CHUNK, record=record, key=key)


def weights_of(folder: Path) -> str:
    """Return what tells the folder's weights from others'."""
    return " ".join(sha256_of(path)[:16] for path in sorted(folder.glob("*/openvino_model.bin")))


def hashed(text: str) -> str:
    """Return a short name for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def measure(
    recipe: str, folder: Path, before: Verdicts, after: Verdicts, pictures: tuple[Pictures, ...]
) -> Result:
    """Compare one recipe with the float model, picture by picture."""
    right = [column(verdicts, "right") for verdicts in (before, after)]
    count = len(right[1])
    components = ModelFolder.open(folder).components.values()
    alike: list[tuple[float, float]] = []
    if recipe != REFERENCE:
        assert len(before) == count
        pairs = zip(*(entry.load(count) for entry in pictures), strict=True)
        alike = [(min(CAP, psnr(*pair)), ssim(*pair)) for pair in pairs]
    decibels = [value for value, _ in alike]
    return Result(
        recipe=recipe,
        bytes=sum(part.bytes for part in components),
        adherence=wilson(int(right[1].sum()), count),
        difference=None if recipe == REFERENCE else paired_difference(right[0], right[1]),
        median_psnr=float(np.median(decibels)) if alike else None,
        tenth_psnr=float(np.quantile(decibels, 0.1)) if alike else None,
        median_ssim=float(np.median([value for _, value in alike])) if alike else None,
    )


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table of the results."""
    lines = [
        "| recipe | MB | everything right | difference to fp16 | loses at most"
        " | PSNR: median, lowest tenth | SSIM: median | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result.recipe, f"{result.bytes / 1e6:.1f}", interval(result.adherence)]
        if result.difference is None:
            cells += ["", "", "", "", ""]
        else:
            cells.append(interval(result.difference, points=True))
            cells.append(f"{max(0.0, -100 * result.difference.low):.2f} points")
            cells.append(f"{result.median_psnr:.1f} dB, {result.tenth_psnr:.1f} dB")
            cells.append(f"{result.median_ssim:.3f}")
            cells.append(verdict(result))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(share: Share, *, points: bool = False) -> str:
    """Return a share in percent, or a difference in points, with its 95 % interval."""
    if points:
        return f"{100 * share.value:+.2f} [{100 * share.low:+.2f}, {100 * share.high:+.2f}]"
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def verdict(result: Result) -> str:
    """Return whether the goals of GOALS are met, and which is missed."""
    if result.recipe not in GOALS or result.difference is None or result.median_psnr is None:
        return ""
    points, decibels = GOALS[result.recipe]
    missed = []
    if -100 * result.difference.low > points:
        missed.append(f"{points:g} points")
    if result.median_psnr < decibels:
        missed.append(f"{decibels:g} dB")
    return f"misses {' and '.join(missed)}" if missed else "met"


def report(results: Sequence[Result], options: argparse.Namespace) -> str:
    """Return docs/quality.md."""
    command = "python scripts/measure_compression.py " + " ".join(
        [f"--prompts {options.prompts}", f"--steps {options.steps}", *options.recipe_words]
        + ([] if options.precision == "f32" else [f"--precision {options.precision}"])
    )
    floats = "f32 arithmetic where a recipe leaves floats, CPU."
    if options.precision != "f32":
        floats = (
            f"{options.precision} where a recipe leaves floats in UNet and autoencoder, f32"
            " elsewhere and in fp16, CPU."
        )
    return "\n".join(
        [
            "# What compression costs the demo model",
            "",
            f"{options.prompts} prompts of colour-shape-background combinations that it was never"
            f" trained on, the same prompts and seeds for every recipe, {options.steps} steps,"
            f" guidance {GUIDANCE_SCALE:g}, {floats} In brackets 95 %"
            " intervals: Wilson's for shares; for the paired difference, in points, Agresti and"
            " Min's. `loses at most` is its far end.",
            "",
            "```",
            command.rstrip(),
            "```",
            "",
            table(results),
            "",
        ]
    )


@contextmanager
def scratch_folder(record: Path | None) -> Iterator[Path]:
    """Give ``record``, or a temporary folder."""
    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
        yield record
        return
    folder = Path(tempfile.mkdtemp(prefix="sdvino-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(options: argparse.Namespace, scratch: Path, show: Callable[[str], None]) -> list[Result]:
    """Measure every recipe, the float model first."""
    tasks = held_out_tasks(options.prompts)
    names = list(dict.fromkeys([REFERENCE, *options.recipes]))
    results: list[Result] = []
    reference: tuple[Verdicts, Pictures] | None = None
    for name in names:
        folder = prepare(name, scratch)
        show(f"{name}: {len(tasks)} pictures of {options.steps} steps")
        # Of another model or number of steps, nothing is taken over.
        stem = f"{folder.name}-{options.steps}-{hashed(weights_of(folder))}"
        precision: Precision = "f32" if name == REFERENCE else options.precision
        if precision != "f32":
            stem += f"-{precision}"
        pictures = Pictures(scratch / "pictures" / stem)
        record = scratch / f"{stem}.record"
        verdicts = draw(folder, tasks, pictures, record, options.steps, precision=precision)
        if reference is None:
            reference = (verdicts, pictures)
        both = (reference[1], pictures)
        results.append(measure(name, folder, reference[0], verdicts, both))
        show(table(results[-1:]))
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="names, or TOML files")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="f32",
        help="of what the recipes leave in floats in UNet and autoencoder",
    )
    parser.add_argument("--record", type=Path, help="keep models and pictures here and go on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="for quality.md and .json")
    options = parser.parse_args(arguments)
    if options.prompts < 1 or options.steps < 1:
        parser.error("--prompts and --steps are 1 or more")
    given = options.recipes != list(RECIPES)
    options.recipe_words = options.recipes if given else []
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with scratch_folder(options.record) as scratch:
            results = run(options, scratch, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("\ninterrupted; with --record the same command goes on from here", file=sys.stderr)
        return 130
    text = report(results, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.md").write_text(text, encoding="utf-8")
    values: dict[str, Any] = {
        "prompts": options.prompts,
        "steps": options.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "results": [asdict(result) for result in results],
    }
    path = options.out / "quality.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
