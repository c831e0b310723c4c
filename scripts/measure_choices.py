"""What each choice of the int8 recipe costs: python scripts/measure_choices.py FOLDER [--component]

FOLDER is a converted folder in half precision (sdvino convert SOURCE FOLDER --recipe fp16). One of
its components is quantized in every variant on calibration inputs, and its output compared with the
float component's on inputs of other prompts and seeds: the relative error, as this processor
computes it and as one without overflow would (OpenVINO's low-precision kernels switched off).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.calibration import CalibrationInputs, make_plan
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.folder import calibrate, compress_component
from sdvino.compress.ir import read_ir
from sdvino.compress.prompts import GENERAL_PROMPTS, read_prompts
from sdvino.compress.recipes import CalibrationRecipe, get_recipe
from sdvino.compress.targets import Target, get_target
from sdvino.errors import SdvinoError
from sdvino.model_folder import ModelFolder

Sample = dict[str, NDArray[Any]]
Array = NDArray[np.float32]
EXACT = {"LP_TRANSFORMS_MODE": "NO"}


def variants(recipe: ComponentRecipe, target: Target) -> dict[str, tuple[ComponentRecipe, Target]]:
    """Return what is compared, by name; each differs from the first in one choice."""
    change = dataclasses.replace
    found = {"the recipe": (recipe, target)}
    for fix in ("off", "first-layer", "all"):
        if fix != target.overflow_fix:
            found[f"overflow fix: {fix}"] = (recipe, change(target, overflow_fix=fix))
    for alpha in (None, 0.5, 0.8):
        name = "no SmoothQuant" if alpha is None else f"SmoothQuant {alpha}"
        found[name] = (change(recipe, smooth_quant_alpha=alpha), target)
    found["attention in 8 bits"] = (change(recipe, quantize_attention=True), target)
    found["weights by tensor"] = (change(recipe, granularity="tensor"), target)
    shortcuts = tuple(layers.replace("|conv_shortcut", "") for layers in recipe.float_layers)
    found["conv_shortcut in 8 bits"] = (change(recipe, float_layers=shortcuts), target)
    found["residual sources in 8 bits"] = (change(recipe, float_residual_sources=False), target)
    return found


def inputs(
    folder: ModelFolder, prompts: Sequence[str], samples: int, seed: int
) -> CalibrationInputs:
    """Return what the float pipeline fed its components on every other prompt."""
    side = (folder.height // folder.vae_scale_factor, folder.width // folder.vae_scale_factor)
    scale = folder.suggested.guidance_scale
    recipe = CalibrationRecipe(trajectories=24, strata=8, samples=samples, seed=seed)
    plan = make_plan(
        recipe,
        prompts,
        unet_bytes=0,
        guidance_scale=7.5 if scale is None else scale,
        shape=(folder.latent_channels, *side),
    )
    return calibrate(folder.path, plan)


def outputs(model: ov.Model, samples: Sequence[Sample], properties: dict[str, str]) -> list[Array]:
    """Return the first output for each sample, at the samples' own static shapes."""
    model = model.clone()
    model.reshape({name: list(array.shape) for name, array in samples[0].items()})
    properties = {"INFERENCE_PRECISION_HINT": "f32", **properties}
    compiled = ov.Core().compile_model(model, "CPU", properties)
    return [np.array(compiled(sample)[0]) for sample in samples]


def error(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """Return the mean relative error."""
    pairs = zip(found, expected, strict=True)
    return float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="converted with --recipe fp16")
    parser.add_argument("--component", choices=("unet", "vae_decoder"), default="unet")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--prompts", type=Path, help="one a line; default: a general list")
    parser.add_argument("--samples", type=int, default=96, help="inputs of the UNet")
    options = parser.parse_args()
    try:
        folder = ModelFolder.open(options.folder)
        texts = GENERAL_PROMPTS if options.prompts is None else read_prompts(options.prompts)
        name = options.component
        xml = folder.components[name].xml
        given = inputs(folder, texts[::2], options.samples, seed=0).of(name)
        unseen = inputs(folder, texts[1::2], options.samples // 2, seed=1).of(name)
        expected = outputs(read_ir(xml), unseen, {})
        print(f"{name}, {len(given)} inputs, {len(unseen)} unseen: relative error")
        print(f"{'':32}{'here':>8}{'exact':>8}")
        recipe, target = get_recipe("int8").component(name), get_target(options.target)
        for what, (changed, chosen) in variants(recipe, target).items():
            model = compress_component(name, read_ir(xml), changed, given, chosen)
            here, exact = (error(outputs(model, unseen, p), expected) for p in ({}, EXACT))
            print(f"{what:32}{here:8.2%}{exact:8.2%}", flush=True)
    except SdvinoError as problem:
        print(f"measure_choices: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
