"""Compress the components of an exported folder, in place, as a recipe says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan, collect
from sdvino.compress.float_pipeline import FloatPipeline
from sdvino.compress.ir import make_core, read_ir, save_ir
from sdvino.compress.quantization import quantize
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import Recipe
from sdvino.compress.weights import compress_weights

#: Called with what is being done and the share of it done, 0 to 1.
Progress = Callable[[str, float], None]

XML = "openvino_model.xml"


def compress_folder(
    folder: Path,
    components: Sequence[str],
    recipe: Recipe,
    *,
    plan: CalibrationPlan,
    progress: Progress,
    source: Path | None = None,
) -> None:
    """Replace the float IR of each of ``components`` in ``folder`` by what ``recipe`` asks for.

    One component is in memory at a time. The float pipeline of the folder runs first, when
    anything is to be quantized. ``source`` is a folder that holds the float IR, where ``folder``
    holds it no more.
    """
    source = folder if source is None else source
    inputs = None
    if any(recipe.treatment(name) == "int8" for name in components):
        progress("calibrate", 0.0)
        with quiet():
            pipeline = FloatPipeline(source, make_core())
        inputs = collect(pipeline, plan, lambda share: progress("calibrate", share))
        del pipeline
        gc.collect()
    for name in components:
        if recipe.treatment(name) != "fp16":
            _compress(source, folder, name, recipe, inputs, progress)
            gc.collect()
        elif source != folder:
            save_ir(read_ir(source / name / XML), folder / name / XML)


def _compress(
    source: Path,
    folder: Path,
    name: str,
    recipe: Recipe,
    inputs: CalibrationInputs | None,
    progress: Progress,
) -> None:
    what = f"compress {name}"
    progress(what, 0.0)
    model = read_ir(source / name / XML)
    if recipe.treatment(name) == "int8-weights" or inputs is None:
        model = compress_weights(model)
    else:
        model = quantize(name, model, inputs.of(name), progress=lambda part: progress(what, part))
    save_ir(model, folder / name / XML)
    progress(what, 1.0)
