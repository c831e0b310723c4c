"""Freeze what sdvino computes, and compare with it later: for changes that must change nothing.

    python scripts/freeze.py write FOLDER       before the change
    python scripts/freeze.py compare FOLDER     after it; exit status 1 where something differs

Frozen are the latents of every sampler on every grid, pictures by every option, both of the bundled
model on the CPU in f32, and the files that every recipe makes of the bundled source. Latents may
differ by 1e-6 of their largest number, pictures by one level of 255, files by no byte.
`--only latents pictures files` takes some of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino import (
    DeviceSettings,
    RequestError,
    RunSettings,
    SpeedSettings,
    StableDiffusionPipeline,
)
from sdvino.compress.recipes import RECIPES
from sdvino.settings import SAMPLERS, SIGMA_SCHEDULES, TIMESTEP_SPACINGS

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "shapes"
SOURCE = ROOT / "models" / "shapes-source"
PROMPT = "a big red star on a blue background"
#: Largest difference of latents, over the largest of their numbers.
LATENTS = 1e-6
#: Largest difference of pictures, in levels of 255.
LEVELS = 1
Values = dict[str, NDArray[Any]]

#: What scheduler_config.json may say besides: name -> the keys that differ.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "sample": {"prediction_type": "sample"},
    "zero snr": {"rescale_betas_zero_snr": True},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholds": {"thresholding": True, "sample_max_value": 2.0},
    "to one": {"set_alpha_to_one": True, "steps_offset": 0},
    "first order": {"solver_order": 1},
    "third order": {"solver_order": 3},
    "heun": {"solver_type": "heun"},
    "bh2": {"solver_type": "bh2"},
    "ends high": {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    "not lower": {"lower_order_final": False},
    "runge-kutta": {"skip_prk_steps": False},
    "multistep": {"skip_prk_steps": True},
    "continuous": {"timestep_type": "continuous", "use_karras_sigmas": True},
    "sigmas": {"sigma_min": 0.05, "sigma_max": 9.0, "use_karras_sigmas": True},
    "log linear": {"interpolation_type": "log_linear"},
    "lambdas": {"use_lu_lambdas": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}

_EXACT = DeviceSettings(precision="f32", num_threads=1)


def pipeline(folder: Path = MODEL, **settings: Any) -> StableDiffusionPipeline:
    """Return the pipeline of ``folder``, with arithmetic that is the same on every start."""
    run = replace(RunSettings(default=_EXACT), **settings)
    return StableDiffusionPipeline.from_pretrained(folder, settings=run, profile=False)


def latents() -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what every sampler leaves on every grid."""
    pipe = pipeline()
    grids = product(SAMPLERS, SIGMA_SCHEDULES, TIMESTEP_SPACINGS, (1, 4, 11), (0.0, 0.7))
    for sampler, sigmas, spacing, steps, eta in grids:
        if eta and sampler not in ("ddim", "tcd"):
            continue
        asked = {"scheduler": sampler, "sigma_schedule": sigmas, "timestep_spacing": spacing}
        name = f"{sampler} {sigmas} {spacing} {steps} {eta:g}"
        yield name, _latents(pipe, asked, num_inference_steps=steps, eta=eta)
    with tempfile.TemporaryDirectory() as place:
        for name, changes in CONFIGS.items():
            folder = Path(shutil.copytree(MODEL, Path(place, name.replace(" ", "-"))))
            file = folder / "scheduler" / "scheduler_config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, **changes}), encoding="utf-8")
            pipe = pipeline(folder)
            for sampler, steps in product(SAMPLERS, (5, 18)):
                found = _latents(pipe, {"scheduler": sampler}, num_inference_steps=steps)
                yield f"{name}: {sampler} {steps}", found


def _latents(pipe: StableDiffusionPipeline, asked: Mapping[str, Any], **more: Any) -> NDArray[Any]:
    """Return finished latents, or nothing where sdvino says that they cannot be had."""
    try:
        found = pipe(PROMPT, seed=7, guidance_scale=4.0, output_type="latent", **asked, **more)
    except RequestError:
        return np.empty(0, np.float32)
    return np.asarray(found.images)


def pictures() -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield pictures by every option of a call, uint8 [N, H, W, 3]."""
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "negative": {"negative_prompt": "blue"},
        "several": {"num_images_per_prompt": 2},
        "two prompts": {"prompt": [PROMPT, "a small green square on a white background"]},
        "large": {"height": 96, "width": 128},
        "clip skip": {"clip_skip": 1},
        "unguided": {"guidance_scale": 1.0},
        "rescaled": {"guidance_rescale": 0.7},
        "cuda": {"noise": "cuda"},
        "ancestral": {"scheduler": "euler_ancestral"},
        "eta": {"eta": 0.5},
        "karras": {"scheduler": "dpmpp_2m", "sigma_schedule": "karras"},
        "batch": {"guidance_mode": "batch"},
        "streams": {"guidance_mode": "streams"},
        "in turn": {"guidance_mode": "sequential"},
        "interval": {"guidance_interval": (0.2, 0.7)},
        "interval, batch": {"guidance_interval": (0.2, 0.7), "guidance_mode": "batch"},
        "interval, heun": {"guidance_interval": (0.2, 0.7), "scheduler": "heun"},
        "interval, pndm": {"guidance_interval": (0.2, 0.7), "scheduler": "pndm"},
        "tokens": {"speed": SpeedSettings(token_downsampling=2)},
        "cached": {"speed": SpeedSettings(cache_interval=2)},
        "cached, heun": {"speed": SpeedSettings(cache_interval=3), "scheduler": "heun"},
        "cached, branch": {"speed": SpeedSettings(cache_interval=3, cache_branch=1)},
        "cached, batch": {"speed": SpeedSettings(cache_interval=2, guidance_mode="batch")},
        "tiny": {"speed": SpeedSettings(tiny_vae=True)},
    }
    whole = pipeline()
    for name, call in calls.items():
        yield name, _picture(whole, call)
    yield "low memory", _picture(pipeline(low_memory=True), {})
    tiled = pipeline()
    tiled.vae_tiling = True
    yield "tiled", _picture(tiled, {"height": 128, "width": 128})
    start = np.random.default_rng(5).standard_normal((1, 4, 8, 8)).astype(np.float32)
    yield "given latents", _picture(whole, {"latents": start, "height": 64, "width": 64})


def _picture(pipe: StableDiffusionPipeline, call: Mapping[str, Any]) -> NDArray[Any]:
    given = {"prompt": PROMPT, "seed": 11, "num_inference_steps": 8, **call}
    return np.stack([np.asarray(picture) for picture in pipe(**given).images])


def files() -> Iterator[tuple[str, str]]:
    """Yield the SHA-256 of every file that every recipe makes of the bundled source."""
    with tempfile.TemporaryDirectory() as place:
        for recipe in RECIPES:
            folder = Path(place, recipe)
            words = ["convert", str(SOURCE), str(folder), "--recipe", recipe, "--no-gate"]
            subprocess.run([sys.executable, "-m", "sdvino", *words], check=True, cwd=ROOT)
            for path in sorted(folder.rglob("openvino_*")):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                yield f"{recipe}: {path.relative_to(folder).as_posix()}", digest


def differences(
    before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]], most: float, unit: str
) -> list[str]:
    """Return a line for each name whose numbers are others; ``most`` is what they may differ."""
    lines = [f"{name}: only on one side" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name].astype(np.float64), after[name].astype(np.float64)
        if a.shape != b.shape:
            lines.append(f"{name}: {a.shape} was frozen, {b.shape} is there")
            continue
        scale = 1.0 if unit == "levels" or not a.size else float(np.abs(a).max())
        worst = float(np.abs(a - b).max()) / scale if a.size else 0.0
        if not worst <= most:
            lines.append(f"{name}: {worst:.2g} {unit}")
    return lines


def collect(what: str, found: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Return all of ``found``, telling on stderr how far it is."""
    values = {}
    for number, (name, value) in enumerate(found, 1):
        values[name] = value
        print(f"\r{what}: {number}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return values


ARRAYS: Mapping[str, tuple[Callable[[], Iterator[tuple[str, NDArray[Any]]]], float, str]] = {
    "latents": (latents, LATENTS, "of the largest"),
    "pictures": (pictures, LEVELS, "levels"),
}


def main() -> int:
    """Write, or compare and print what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("do", choices=("write", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=(*ARRAYS, "files"), default=(*ARRAYS, "files"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for what in (name for name in ARRAYS if name in options.only):
        make, most, unit = ARRAYS[what]
        found, path = collect(what, make()), options.folder / f"{what}.npz"
        if options.do == "write":
            np.savez_compressed(path, **found)
            continue
        with np.load(path) as frozen:
            lines += [f"{what}, {line}" for line in differences(frozen, found, most, unit)]
    if "files" in options.only:
        hashes, path = collect("files", files()), options.folder / "files.json"
        if options.do == "write":
            path.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
        else:
            known = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(known.keys() | hashes.keys())
            lines += [f"files, {n}: another" for n in names if known.get(n) != hashes.get(n)]
    print("\n".join(lines) if lines else f"{options.do}: nothing differs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
