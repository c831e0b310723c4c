"""What each choice of the int8 recipe costs: python scripts/measure_choices.py FOLDER [--component]

FOLDER is a converted folder in half precision (sdvino convert SOURCE FOLDER --recipe fp16). One of
its components is quantized in every variant on calibration inputs, and its output compared with the
float component's on inputs of other prompts and seeds: the relative error, as this processor
computes it and as one without overflow would (OpenVINO's low-precision kernels switched off).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.compress.calibration import CalibrationInputs, make_plan
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.folder import calibrate, compress_component
from sdvino.compress.fragile import float_nodes
from sdvino.compress.layers import (
    attention_nodes,
    nodes_with_weights,
    operations,
    residual_sources,
)
from sdvino.compress.prompts import GENERAL_PROMPTS
from sdvino.compress.quantization import OVERFLOW
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import CalibrationRecipe, get_recipe
from sdvino.compress.targets import Target, get_target
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.graph.saving import read_ir
from sdvino.inputs.files import read_prompts

Sample = dict[str, NDArray[Any]]
Array = NDArray[np.float32]
EXACT = {"LP_TRANSFORMS_MODE": "NO"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to quantize a component."""

    recipe: ComponentRecipe
    target: Target
    #: Every conv_shortcut becomes one convolution for each of its sources, the block and the skip.
    split: bool = False
    #: NNCF's default for convolutional networks, which has sums of residuals in 8 bits too, and no
    #: SmoothQuant.
    sums: bool = False


def variants(recipe: ComponentRecipe, target: Target) -> dict[str, Variant]:
    """Return what is compared, by name; each differs from the first in one choice."""
    first = Variant(recipe, target)
    found = {"the recipe": first}
    for fix in ("off", "first-layer", "all"):
        if fix != target.overflow_fix:
            found[f"overflow fix: {fix}"] = Variant(recipe, replace(target, overflow_fix=fix))
    for alpha in (None, 0.5, 0.8):
        name = "no SmoothQuant" if alpha is None else f"SmoothQuant {alpha}"
        found[name] = Variant(replace(recipe, smooth_quant_alpha=alpha), target)
    found["attention in 8 bits"] = Variant(replace(recipe, quantize_attention=True), target)
    found["weights by tensor"] = Variant(replace(recipe, granularity="tensor"), target)
    layers = tuple(pattern.replace("|conv_shortcut", "") for pattern in recipe.float_layers)
    bare = replace(recipe, float_layers=layers)
    found["conv_shortcut in 8 bits"] = Variant(bare, target)
    found["conv_shortcut split, in 8 bits"] = Variant(bare, target, split=True)
    found["residual sources in 8 bits"] = Variant(
        replace(recipe, float_residual_sources=False), target
    )
    found["residual sums in 8 bits"] = replace(first, sums=True)
    return found


def split_shortcuts(model: ov.Model) -> int:
    """Split the shortcuts over a concatenation by its sources, in place; return how many were.

    A 1x1 convolution over joined channels is the sum of one over each of them: exact but for
    rounding, and each gets scales of its own when it is quantized (Q-Diffusion, arXiv:2302.04304).
    """
    done = 0
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Convolution" or "conv_shortcut" not in name:
            continue
        joined = node.input_value(0).get_node()
        if joined.get_type_name() != "Concat":
            continue
        stored = node.input_value(1).get_node()
        if stored.get_type_name() == "Convert":
            stored = stored.input_value(0).get_node()
        weights, start, total = stored.get_data(), 0, None
        for index, source in enumerate(joined.input_values()):
            end = start + source.get_partial_shape()[1].get_length()
            part = ops.constant(np.ascontiguousarray(weights[:, start:end], np.float32))
            one = ops.convolution(source, part, [1, 1], [0, 0], [0, 0], [1, 1])
            one.set_friendly_name(f"{name}.{index}")
            total = one if total is None else ops.add(total, one)
            start = end
        assert total is not None
        node.output(0).replace(total.output(0))
        done += 1
    model.validate_nodes_and_infer_types()
    return done


def with_sums(name: str, model: ov.Model, given: Sequence[Sample], variant: Variant) -> ov.Model:
    """Return ``model`` quantized as NNCF does by default, sums of residuals among it."""
    import nncf

    ignored = [
        *float_nodes(variant.recipe, name, nodes_with_weights(model), (), operations(model)),
        *attention_nodes(model),
        *residual_sources(model),
    ]
    parameters = nncf.AdvancedQuantizationParameters(
        overflow_fix=getattr(nncf.OverflowFix, OVERFLOW[variant.target.overflow_fix])
    )
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(list(given)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(given),
            ignored_scope=nncf.IgnoredScope(names=list(dict.fromkeys(ignored))),
            advanced_parameters=parameters,
        )


def quantized(name: str, model: ov.Model, given: Sequence[Sample], variant: Variant) -> ov.Model:
    """Return ``model``, the float component, as ``variant`` has it; it is consumed."""
    if variant.split and not split_shortcuts(model):
        raise SdvinoError(f"The {name} has no shortcut over a concatenation.")
    if variant.sums:
        return with_sums(name, model, given, variant)
    return compress_component(name, model, variant.recipe, given, variant.target)


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
        for what, variant in variants(recipe, target).items():
            if variant.split and name != "unet":
                continue  # a decoder joins nothing
            model = quantized(name, read_ir(xml), given, variant)
            here, exact = (error(outputs(model, unseen, p), expected) for p in ({}, EXACT))
            print(f"{what:32}{here:8.2%}{exact:8.2%}", flush=True)
    except SdvinoError as problem:
        print(f"measure_choices: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
