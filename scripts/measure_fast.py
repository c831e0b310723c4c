"""Measure what each way to a sooner picture costs, on the demo model: docs/fast.md and .json.

    python scripts/measure_fast.py models/shapes --prompts 500 --work build/fast

Every variant draws the same held-out prompts with the same seeds as the exact pipeline. How often
it draws what was asked for is judged by scripts/evaluate_demo.py, the change from the exact one by
pairs; PSNR says how near each picture is to its exact twin. Seconds are taken afterwards, of all
variants in turn, so that they want a quiet machine for a few minutes only. With --work a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_demo
import numpy as np
import openvino as ov
from evaluate_demo import Share, Task, Verdicts, column, paired_difference, wilson
from PIL import Image

from sdvino import SdvinoError, SpeedSettings, StableDiffusionPipeline, __version__
from sdvino.image.picture import save_picture
from sdvino.settings import FAST

ROOT = Path(__file__).resolve().parent.parent
#: Pictures alike to the last bit have no finite PSNR.
MAX_PSNR = 99.0


@dataclass(frozen=True)
class Variant:
    """One way to draw."""

    name: str
    #: As typed; empty for the exact pictures.
    options: str
    speed: SpeedSettings


EXACT = Variant("exact", "", SpeedSettings())
VARIANTS = (
    EXACT,
    Variant(
        "guidance in the first 80 %",
        "--guidance-interval 0 0.8",
        SpeedSettings(guidance_interval=(0.0, 0.8)),
    ),
    Variant(
        "guidance from 10 to 70 %",
        "--guidance-interval 0.1 0.7",
        SpeedSettings(guidance_interval=(0.1, 0.7)),
    ),
    Variant("keys thinned 2 x 2", "--token-downsampling 2", SpeedSettings(token_downsampling=2)),
    Variant("keys thinned 4 x 4", "--token-downsampling 4", SpeedSettings(token_downsampling=4)),
    Variant("caching, every 2nd", "--cache-interval 2", SpeedSettings(cache_interval=2)),
    Variant("caching, every 3rd", "--cache-interval 3", SpeedSettings(cache_interval=3)),
    Variant("caching, every 5th", "--cache-interval 5", SpeedSettings(cache_interval=5)),
    Variant(
        "caching, every 3rd, deeper",
        "--cache-interval 3 --cache-branch 2",
        SpeedSettings(cache_interval=3, cache_branch=2),
    ),
    Variant("tiny VAE", "--tiny-vae", SpeedSettings(tiny_vae=True)),
    Variant("all of the mix", "--fast", FAST),
)


@dataclass(frozen=True)
class Drawn:
    """What is kept of a picture beside its verdict."""

    index: int
    psnr: float
    evaluations: float


@dataclass(frozen=True)
class Result:
    """A variant over all prompts."""

    variant: Variant
    right: Share
    change: Share | None
    psnr: float
    seconds: float
    evaluations: float


def psnr(picture: Image.Image, exact: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB, at most MAX_PSNR."""
    difference = np.asarray(picture, np.float64) - np.asarray(exact, np.float64)
    mse = float(np.mean(difference**2))
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / mse))


class Artist:
    """Draws the pictures of one variant, and writes down what is kept of each."""

    def __init__(
        self, folder: Path, variant: Variant, steps: int, guidance: float, work: Path
    ) -> None:
        self._pipe = StableDiffusionPipeline.from_pretrained(folder)
        self._variant = variant
        self._steps = steps
        self._guidance = guidance
        self._work = work
        self.record = work / f"{_file_name(variant.name)}.jsonl"

    def __call__(self, prompts: list[str], seed: int) -> list[Image.Image]:
        """Draw ``prompts``; seeds are the numbers of the tasks. See `evaluate_demo.Generate`."""
        out = self._pipe(
            prompts,
            seed=seed,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            speed=self._variant.speed,
        )
        evaluations = out.timings.unet_evaluations / len(prompts)
        lines = []
        for i, picture in enumerate(out.images, seed):
            twin = self._work / "exact" / f"{i:05d}.png"
            if self._variant == EXACT:
                twin.parent.mkdir(parents=True, exist_ok=True)
                save_picture(picture, twin, out.records[i - seed], overwrite=True)
            with Image.open(twin) as exact:
                near = psnr(picture, exact)
            lines.append(json.dumps(asdict(Drawn(i, near, evaluations))) + "\n")
        with self.record.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        return list(out.images)

    def drawn(self, count: int) -> list[Drawn]:
        """Return what was kept of the first ``count`` pictures, in this run and those before."""
        found: dict[int, Drawn] = {}
        for line in self.record.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            found[kept["index"]] = Drawn(kept["index"], kept["psnr"], kept["evaluations"])
        return [found[i] for i in range(count)]


def time_variants(
    folder: Path, variants: Sequence[Variant], tasks: Sequence[Task], options: argparse.Namespace
) -> list[float]:
    """Return each variant's seconds a picture, loading left out: medians, all of them in turn."""
    pipes = [StableDiffusionPipeline.from_pretrained(folder) for _ in variants]
    prompts = [task.prompt.text for task in tasks[: options.batch]]
    found: list[list[float]] = [[] for _ in variants]
    for _ in range(1 + options.rounds):  # the first round loads
        for pipe, variant, seconds in zip(pipes, variants, found, strict=True):
            out = pipe(
                prompts,
                seed=0,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                speed=variant.speed,
            )
            seconds.append((out.timings.denoise + out.timings.decode) / len(prompts))
    return [float(np.median(seconds[1:])) for seconds in found]


def measure(
    folder: Path, variants: Sequence[Variant], tasks: Sequence[Task], options: argparse.Namespace
) -> list[Result]:
    """Draw and judge every task in every variant, the exact one first; then take the times."""
    judged: list[tuple[Verdicts, list[Drawn]]] = []
    for variant in variants:
        print(f"{variant.name} {variant.options}", file=sys.stderr, flush=True)
        artist = Artist(folder, variant, options.steps, options.guidance_scale, options.work)
        key = {
            "folder": _fingerprint(folder),
            "speed": repr(variant.speed),
            "steps": options.steps,
            "guidance": options.guidance_scale,
            "version": __version__,
        }
        verdicts = evaluate_demo.evaluate(
            artist, tasks, options.batch, artist.record.with_suffix(".verdicts"), key
        )
        judged.append((verdicts, artist.drawn(len(tasks))))
    print("times", file=sys.stderr, flush=True)
    times = time_variants(folder, variants, tasks, options)
    exact = column(judged[0][0], "right")
    results = []
    for variant, (verdicts, drawn), seconds in zip(variants, judged, times, strict=True):
        right = column(verdicts, "right")
        results.append(
            Result(
                variant,
                wilson(int(right.sum()), len(right)),
                None if variant == EXACT else paired_difference(exact, right),
                float(np.median([one.psnr for one in drawn])),
                seconds,
                float(np.mean([one.evaluations for one in drawn])),
            )
        )
    return results


def table(results: Sequence[Result]) -> str:
    """Return the results as a table in Markdown."""
    exact = results[0].seconds
    lines = [
        "| | option | seconds a picture | UNet runs | PSNR to the exact picture"
        " | draws what was asked | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        change = "" if one.change is None else _share(one.change)
        near = "" if one.variant == EXACT else f"{one.psnr:.1f} dB"
        option = f"`{one.variant.options}`" if one.variant.options else ""
        lines.append(
            f"| {one.variant.name} | {option} | {one.seconds:.3f} ({exact / one.seconds:.2f} x)"
            f" | {one.evaluations:g} | {near} | {_share(one.right)} | {change} |"
        )
    return "\n".join(lines)


def report(results: Sequence[Result], options: argparse.Namespace, command: str) -> str:
    """Return docs/fast.md."""
    return f"""# Sooner, at a price

`sdvino generate --fast`, or each of its parts by name; in Python `speed=SpeedSettings(...)`.
Nothing of this is on unless asked for, and a picture carries what it was made with, so that
`--like` repeats it.

- **Guidance interval** (Kynkäänniemi et al. 2024, arXiv:2404.07724): outside it only the prompt's
  own prediction is made, half the work of a step.
- **Token downsampling** (ToDo, Smith et al. 2024, arXiv:2402.13573): the largest self-attentions
  read every 2nd (4th) key and value along each side. It pays where pictures are large.
- **Step caching** (DeepCache, Ma et al. 2023, arXiv:2312.00858): at the steps in between only the
  outermost part of the UNet runs, on what its deep part gave before.
- **Tiny VAE**: the folder's small decoder in place of the autoencoder's own.

Measured on the bundled demo model, {options.prompts} held-out prompts, {options.steps} steps,
guidance {options.guidance_scale:g}, with the intervals that hold 95 %. A change is counted by pairs
of one prompt and seed. Seconds, of {options.rounds} rounds in turn, are of this small model on one
machine ({_machine()}), where the UNet is cheap: what is saved grows with model and picture.

{table(results)}

PSNR and seconds are medians. {datetime.date.today().isoformat()}, sdvino {__version__},
OpenVINO {ov.get_version()}. This page is written by

    {command}
"""


def _share(share: Share) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _fingerprint(folder: Path) -> str:
    """Return what tells one converted model from another: its manifest, SHA-256 sums and all."""
    manifest = folder / "sdvino.json"
    return manifest.read_text(encoding="utf-8") if manifest.exists() else str(folder.resolve())


def _machine() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "models" / "shapes")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=evaluate_demo.GUIDANCE_SCALE)
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn in one call")
    parser.add_argument("--rounds", type=int, default=5, help="of the times")
    parser.add_argument("--only", action="append", help="a variant, such as --only=--fast")
    parser.add_argument("--work", type=Path, help="keep what was measured here and go on from it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "fast.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the page."""
    options = parse(arguments)
    wanted = [v for v in VARIANTS if v == EXACT or not options.only or v.options in options.only]
    tasks = evaluate_demo.held_out_tasks(options.prompts)
    with tempfile.TemporaryDirectory() as temporary:
        if options.work is None:
            options.work = Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        try:
            results = measure(options.folder, wanted, tasks, options)
        except KeyboardInterrupt:
            print("\ninterrupted; with --work the same command goes on", file=sys.stderr)
            return 130
        except SdvinoError as problem:
            print(f"measure_fast: {problem}", file=sys.stderr)
            return 1
    print(table(results))
    command = f"python scripts/measure_fast.py --prompts {options.prompts} --steps {options.steps}"
    options.out.write_text(report(results, options, command), encoding="utf-8")
    values = {
        "prompts": options.prompts,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "machine": _machine(),
        "results": [asdict(result) for result in results],
    }
    text = json.dumps(values, indent=2) + "\n"
    options.out.with_suffix(".json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
