"""Compress the components of an exported folder, in place, as a recipe says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import openvino as ov

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan, collect
from sdvino.compress.float_pipeline import FloatPipeline
from sdvino.compress.quantization import quantize
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import Recipe
from sdvino.compress.weights import compress_weights

#: Called with what is being done and the share of it done, 0 to 1.
Progress = Callable[[str, float], None]


def compress_folder(
    folder: Path,
    components: Sequence[str],
    recipe: Recipe,
    *,
    plan: CalibrationPlan,
    progress: Progress,
) -> None:
    """Replace the float IR of each of ``components`` in ``folder`` by what ``recipe`` asks for.

    One component is in memory at a time. The float pipeline of the folder runs first, when
    anything is to be quantized.
    """
    core = _core()
    inputs = None
    if any(recipe.treatment(name) == "int8" for name in components):
        progress("calibrate", 0.0)
        with quiet():
            pipeline = FloatPipeline(folder, core)
        inputs = collect(pipeline, plan, lambda share: progress("calibrate", share))
        del pipeline
        gc.collect()
    for name in components:
        if recipe.treatment(name) != "fp16":
            _compress(core, folder, name, recipe, inputs, progress)
            gc.collect()


def save_ir(model: ov.Model, xml: Path) -> None:
    """Write ``model`` with its float constants in half precision, over what ``xml`` holds now.

    The old files are replaced only when the new ones are complete.
    """
    fresh = xml.with_name(f"new-{xml.name}")
    ov.save_model(model, fresh, compress_to_fp16=True)
    del model
    gc.collect()
    for suffix in (".bin", ".xml"):
        fresh.with_suffix(suffix).replace(xml.with_suffix(suffix))


def _compress(
    core: ov.Core,
    folder: Path,
    name: str,
    recipe: Recipe,
    inputs: CalibrationInputs | None,
    progress: Progress,
) -> None:
    xml = folder / name / "openvino_model.xml"
    what = f"compress {name}"
    progress(what, 0.0)
    model = core.read_model(xml)
    if recipe.treatment(name) == "int8-weights" or inputs is None:
        model = compress_weights(model)
    else:
        model = quantize(name, model, inputs.of(name), progress=lambda part: progress(what, part))
    save_ir(model, xml)
    progress(what, 1.0)


def _core() -> ov.Core:
    core = ov.Core()
    # A mapped file can be neither replaced nor renamed on Windows.
    core.set_property({"ENABLE_MMAP": False})
    return core
