"""Print how often the demo model draws what the prompt asked for, on held-out combinations.

    python scripts/evaluate_demo.py models/shapes --prompts 2000 --steps 20

Half the prompts ask for one object, half for two in relation; no (colour, shape, background) in
them was ever trained on. Shares come with their 95 % interval. With --record FILE a run that was
stopped goes on where it was. `--backend diffusers` evaluates a diffusers folder with torch instead.

Importable for comparisons: `held_out_tasks`, `evaluate`, `paired_difference`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scene_checker
import scenes
from numpy.typing import NDArray
from PIL import Image
from scene_checker import Verdict

TASK_SEED = 2000
GUIDANCE_SCALE = 3.0
Verdicts = NDArray[np.bool_]  # [pictures, len(FIELDS)]
FIELDS = ("right", "core", *(field.name for field in dataclasses.fields(Verdict)))

# Takes prompts and the seed of the first (the others follow it), returns as many pictures.
Generate = Callable[[list[str], int], list[Image.Image]]


@dataclass(frozen=True)
class Task:
    """A prompt and the seed to draw it with."""

    prompt: scenes.Prompt
    seed: int


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval, all between 0 and 1 (or -1 and 1 for a difference)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.1%}  [{self.low:.1%}, {self.high:.1%}]"


def held_out_tasks(count: int, seed: int = TASK_SEED, held_out: bool = True) -> list[Task]:
    """Return prompts, one object and two objects by turns, always the same for a seed.

    Args:
        count: how many.
        seed: of the prompts; pictures are drawn with the seeds 0, 1, 2, ...
        held_out: False for combinations that training has seen, to measure what is lost.
    """
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(count):
        scene, prompt = scenes.sample_scene(rng, count=1 + i % 2, held_out=held_out)
        # Captions of trained combinations may leave the background open; here it is asked for.
        prompt = dataclasses.replace(prompt, background=scene.background)
        # The plain wording: this measures composition, not paraphrase.
        tasks.append(Task(dataclasses.replace(prompt, text=scenes.caption(prompt)), seed=i))
    return tasks


def evaluate(
    generate: Generate,
    tasks: Sequence[Task],
    batch: int = 8,
    record: Path | None = None,
    key: dict[str, Any] | None = None,
    keep: list[Image.Image] | None = None,
) -> Verdicts:
    """Draw and judge every task; return one row of FIELDS a picture.

    Args:
        generate: draws pictures; see `runtime_backend` and `diffusers_backend`.
        tasks: with consecutive seeds, as `held_out_tasks` makes them.
        batch: pictures drawn in one call.
        record: a file that verdicts are added to, and read from when `key` is the same.
        key: what the recorded verdicts depend on.
        keep: the first pictures are added to this list, up to 64 of them.
    """
    rows = _read_record(record, key, len(tasks))
    done, began = len(rows), time.monotonic()
    while len(rows) < len(tasks):
        part = tasks[len(rows) : len(rows) + batch]
        pictures = generate([task.prompt.text for task in part], part[0].seed)
        verdicts = [
            scene_checker.check(picture, task.prompt)
            for picture, task in zip(pictures, part, strict=True)
        ]
        new = [[bool(getattr(verdict, field)) for field in FIELDS] for verdict in verdicts]
        rows += new
        if keep is not None and len(keep) < 64:
            keep += pictures
        _append_record(record, new)
        left = (time.monotonic() - began) / (len(rows) - done) * (len(tasks) - len(rows))
        right = sum(row[1] for row in rows)
        print(
            f"\r{len(rows)}/{len(tasks)} pictures, {right} right, {left / 60:.1f} min left ",
            end="" if len(rows) < len(tasks) else "\n",
            file=sys.stderr,
            flush=True,
        )
    return np.array(rows, bool).reshape(-1, len(FIELDS))


def _read_record(path: Path | None, key: dict[str, Any] | None, count: int) -> list[list[bool]]:
    """Return the rows recorded for this key; start the file anew when it is for another."""
    if path is None:
        return []
    head = json.dumps({"fields": FIELDS, **({} if key is None else key)})
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines and lines[0] == head:
            return [json.loads(line) for line in lines[1 : count + 1]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "\n", encoding="utf-8")
    return []


def _append_record(path: Path | None, rows: list[list[bool]]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def wilson(successes: int, count: int, z: float = 1.96) -> Share:
    """Return a share and Wilson's score interval (Wilson 1927)."""
    if count == 0:
        return Share(math.nan, 0.0, 1.0)
    p = successes / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    return Share(p, max(middle - half, 0.0), min(middle + half, 1.0))


def paired_difference(before: Verdicts, after: Verdicts, z: float = 1.96) -> Share:
    """Return how the share of right pictures changed, on the same prompts and seeds.

    Args:
        before, after: bool [n], one entry a picture, in the same order.
        z: 1.96 for a 95 % interval.

    The interval is Agresti and Min's (2005): Wald's after adding a half to each of the four cells.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"need two arrays of one length, got {before.shape} and {after.shape}")
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, b, c = len(before) + 2, gained + 0.5, lost + 0.5
    middle = (b - c) / n
    half = z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return Share((gained - lost) / len(before), middle - half, middle + half)


def column(verdicts: Verdicts, field: str) -> NDArray[np.bool_]:
    """Return one field's verdicts, bool [n]."""
    return verdicts[:, FIELDS.index(field)]


def summary(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, Share]:
    """Return the shares that matter, by name."""
    two = np.array([task.prompt.relation is not None for task in tasks])
    sized = np.array([any(w.size for w in task.prompt.objects) for task in tasks])
    placed = np.array([task.prompt.position is not None for task in tasks])

    def share(field: str, among: NDArray[np.bool_]) -> Share:
        return wilson(int(column(verdicts, field)[among].sum()), int(among.sum()))

    return {
        "one object: colour, shape, background": share("core", ~two),
        "two objects: both right, relation": share("core", two),
        "  number of objects": share("count", np.ones_like(two)),
        "  background": share("background", np.ones_like(two)),
        "  colours": share("colour", np.ones_like(two)),
        "  shapes": share("shape", np.ones_like(two)),
        "  relation, of two objects": share("relation", two),
        "  size, where asked for": share("size", sized),
        "  position, where asked for": share("position", placed),
        "everything asked for": share("right", np.ones_like(two)),
    }


def runtime_backend(folder: Path, steps: int, guidance: float, **load: Any) -> Generate:
    """Draw with sdvino from a converted folder; `load` goes to `from_pretrained`."""
    from sdvino import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), **load)

    def generate(prompts: list[str], seed: int) -> list[Image.Image]:
        out = pipe(prompts, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
        return list(out.images)

    return generate


def diffusers_backend(folder: Path, steps: int, guidance: float, threads: int | None) -> Generate:
    """Draw with diffusers, in float32, from a diffusers folder."""
    import torch
    from diffusers import StableDiffusionPipeline

    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seed: int) -> list[Image.Image]:
        noise = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
        out = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=noise)
        return list(out.images)

    return generate


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Return the pictures in rows, a pixel apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 1), rows * (height + 1)), "gray")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 1), i // columns * (height + 1)))
    return sheet


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a converted folder, or with diffusers a source")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--backend", choices=("runtime", "diffusers"), default="runtime")
    parser.add_argument("--device", default="CPU", help="of the runtime, as OpenVINO names it")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--threads", type=int, help="CPU threads (diffusers)")
    parser.add_argument("--trained", action="store_true", help="prompts from trained combinations")
    parser.add_argument("--record", type=Path, help="keep verdicts here and go on from them")
    parser.add_argument("--sheet", type=Path, help="save the first 64 pictures as one")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    tasks = held_out_tasks(options.prompts, held_out=not options.trained)
    settings = (options.folder, options.steps, options.guidance_scale)
    if options.backend == "diffusers":
        generate = diffusers_backend(*settings, options.threads)
    else:
        generate = runtime_backend(*settings, device=options.device)
    key = {
        name: str(getattr(options, name))
        for name in ("folder", "steps", "guidance_scale", "backend", "device", "trained")
    }
    pictures: list[Image.Image] = []
    try:
        verdicts = evaluate(generate, tasks, options.batch, options.record, key, pictures)
    except KeyboardInterrupt:
        print("\ninterrupted; with --record the same command goes on from here", file=sys.stderr)
        return 130
    if options.sheet is not None and pictures:
        contact_sheet(pictures[:64]).save(options.sheet)
    kind = "trained" if options.trained else "held-out"
    print(
        f"{options.folder}: {len(tasks)} {kind} prompts, {options.steps} steps, "
        f"guidance {options.guidance_scale:g}, share right with its 95 % interval"
    )
    for name, share in summary(tasks, verdicts).items():
        print(f"{name:40s}{share}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
