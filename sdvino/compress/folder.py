"""Calibrate an exported folder, and compress its components as a recipe says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import openvino as ov

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan, collect
from sdvino.compress.float_pipeline import FloatPipeline
from sdvino.compress.quantization import Sample, quantize
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import Recipe
from sdvino.compress.weights import compress_weights
from sdvino.errors import SdvinoError

#: Called with the share done, 0 to 1.
Progress = Callable[[float], None]


def calibrate(folder: Path, plan: CalibrationPlan, progress: Progress) -> CalibrationInputs:
    """Run the float pipeline in ``folder`` and return what its components were fed."""
    with quiet():
        pipeline = FloatPipeline(folder, ov.Core())
    inputs = collect(pipeline, plan, progress)
    del pipeline
    gc.collect()
    return inputs


def compress_component(
    name: str,
    model: ov.Model,
    recipe: Recipe,
    samples: Sequence[Sample] | None,
    progress: Progress,
) -> ov.Model:
    """Return ``model``, the float IR of component ``name``, as ``recipe`` has it stored.

    ``samples`` are its calibration inputs, for recipes that need them. ``model`` is consumed.
    Raises SdvinoError when NNCF or OpenVINO fail.
    """
    treatment = recipe.treatment(name)
    try:
        if treatment == "int8" and samples is not None:
            return quantize(name, model, samples, progress=progress)
        return model if treatment == "fp16" else compress_weights(model)
    except RuntimeError as error:  # NNCF's and OpenVINO's exceptions
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SdvinoError(f"The {name} cannot be compressed: {what}") from error
