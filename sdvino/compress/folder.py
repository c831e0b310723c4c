"""Calibrate an exported folder, and compress its components as a recipe says.

`calibrate` and `compress_component` stand alone, so that each can run in a process of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import openvino as ov

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan, collect
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.float_pipeline import FloatPipeline
from sdvino.compress.local_plan import LocalPlan
from sdvino.compress.local_quantization import quantize_local
from sdvino.compress.quantization import compress_weights, quantize, quantize_global
from sdvino.compress.quiet import quiet
from sdvino.compress.statistics import Statistics
from sdvino.compress.stepwise import Sample
from sdvino.compress.targets import Target, get_target
from sdvino.errors import SdvinoError, said_by

#: Schemes that are to multiply as little as they can. The plans of `global` and `local` name the
#: layers that were exported.
_MULTIPLYING_LESS = ("int8", "int8-hybrid")
#: Share of calibrating that the UNet's evaluations are.
_DRAWING = 0.9


def calibrate(
    folder: Path,
    plan: CalibrationPlan,
    progress: Callable[[float], None] | None = None,
    scratch: Path | None = None,
    measured: Mapping[str, Path] = MappingProxyType({}),
) -> CalibrationInputs:
    """Run the float pipeline in ``folder`` as ``plan`` says; return what its parts were fed.

    Statistics of the components ``measured`` go to the files given, meanwhile.

    ``folder`` is a whole model folder (its manifest may be missing) of a family that the runtime
    runs. ``progress`` is called with the share done. ``scratch`` is a folder for what a large UNet
    needs meanwhile; None: the system's. Raises SdvinoError when its pictures are no numbers.
    """
    report = _ignore if progress is None else progress
    with quiet():
        pipeline = FloatPipeline(folder, plan, scratch=scratch, measured=measured)
    inputs = collect(pipeline, plan, lambda share: report(_DRAWING * share))
    pipeline.finish(inputs)
    report(1.0)
    del pipeline
    gc.collect()
    return inputs


def compress_component(
    name: str,
    model: ov.Model | Path,
    recipe: ComponentRecipe,
    calibration: Statistics | Sequence[Sample] = (),
    target: Target | None = None,
    progress: Callable[[float], None] | None = None,
    scratch: Path | None = None,
    planned: Callable[[LocalPlan], None] = lambda plan: None,
) -> ov.Model:
    """Return ``model``, the float IR of the component ``name``, as ``recipe`` has it stored.

    ``model`` is consumed; given as its .xml, the weights are mapped, and in memory only while they
    are worked on. ``calibration`` are the statistics of its activations, or inputs of it, which
    local always takes; recipes that are not `calibrated` need none, nor do the weights of local,
    which are then chosen by themselves. ``target`` None is this machine. ``scratch`` is a folder
    for what large models need meanwhile; None: the system's. ``planned`` is given the choices of
    local. Raises RequestError when the recipe names layers that
    the model has not or a budget that nothing can meet, SdvinoError when NNCF or OpenVINO fail.
    """
    mapped = ov.Core().read_model(model) if isinstance(model, Path) else model
    if recipe.mode == "fp16":
        return mapped
    try:
        if recipe.quantizes_activations and not calibration:
            raise SdvinoError(
                f"There are no calibration inputs for {name}, which {recipe.mode} needs;"
                " choose int8-weights for it."
            )
        target = get_target("auto") if target is None else target
        if recipe.mode == "global":
            return quantize_global(
                name, mapped, calibration, recipe=recipe, target=target, progress=progress
            )
        if recipe.mode == "local":
            assert not isinstance(calibration, Statistics)
            mapped, plan = quantize_local(
                name, mapped, calibration, recipe=recipe, target=target, progress=progress
            )
            planned(plan)
            return mapped
        if not recipe.calibrated:
            return compress_weights(name, mapped, recipe)
        del mapped
        return quantize(
            name,
            model,
            calibration,
            recipe=recipe,
            target=target,
            progress=progress,
            scratch=scratch,
            split_upsamples=recipe.mode in _MULTIPLYING_LESS,
        )
    except RuntimeError as error:  # NNCF's and OpenVINO's exceptions
        raise SdvinoError(f"The {name} cannot be compressed: {said_by(error)}") from error


def _ignore(share: float) -> None:
    """Show nothing."""
