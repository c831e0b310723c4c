"""The steps of a conversion that take torch: `record` and `pass`, each in a process of its own.

See `sdvino.convert.source_passes` for what they are given and leave behind.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import load_samples, save_samples
from sdvino.compress.passes import Context, Origin, SourcePass
from sdvino.compress.prompts import evenly, prompts_of
from sdvino.compress.quiet import quiet
from sdvino.convert.open_source import Source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.request import WorkPlan
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.source_passes import (
    HISTORY_FILE,
    INPUTS,
    LEARNING,
    done_to,
    passed_folder,
    recording,
)
from sdvino.convert.state import describe_files, key_of
from sdvino.convert.suggestions import suggestions
from sdvino.errors import RequestError, SdvinoError
from sdvino.nets.structure import Structure
from sdvino.train.calls import operations, outputs_of, relative_error
from sdvino.train.modules import load_component, load_module, save_component
from sdvino.train.source_inputs import TorchPipeline, record
from sdvino.weights.lora_merge import merge

# What the libraries of models import where it is installed, for what no step does.
_UNUSED = ("peft", "scipy", "sklearn", "torchvision")


def record_inputs(
    plan: WorkPlan, source: Source, output: Path, progress: Callable[[float], None]
) -> None:
    """Write what the components with passes are called with as ``output``/COMPONENT.npz."""
    wanted = sorted({row.component for row in plan.recipe.passes})
    folder = _diffusers(source)
    with quiet():
        needed = wanted if wanted == ["text_encoder"] else ["text_encoder", "unet", "vae"]
        modules = {name: _load(folder, name) for name in needed}
        pipeline = TorchPipeline(
            modules,
            folder.folder("tokenizer"),
            folder.configs["scheduler"],
            guided=recording(plan, source).branches == 2,
            decodes="vae" in wanted,
        )
    calls = record(pipeline, recording(plan, source), wanted, progress)
    for name, samples in calls.items():
        save_samples(output / f"{name}.npz", samples)


def run_pass(
    plan: WorkPlan,
    source: Source,
    work: Path,
    name: str,
    output: Path,
    progress: Callable[[float], None],
) -> None:
    """Do the pass called ``name`` and write the component and its history into ``output``."""
    place = int(name.partition("-")[0]) - 1
    row = plan.recipe.passes[place]
    source = _diffusers(source)
    earlier = passed_folder(work, plan.recipe, row.component, before=place)
    structure = Structure.read(source.folder(row.component) if earlier is None else earlier)
    inputs: list[dict[str, Any]] = []
    if (work / INPUTS / f"{row.component}.npz").is_file():
        inputs = load_samples(work / INPUTS / f"{row.component}.npz")
    with quiet():
        if earlier is None:
            module = _load(source, row.component)
        else:
            module = load_component(earlier, row.component)
    around = Context(inputs=inputs, origin=_origin(plan, source, work, place))
    apply_pass(
        row,
        module,
        Structure() if structure is None else structure,
        source.configs[row.component],
        around,
        output,
        progress,
    )
    gc.collect()


def _origin(plan: WorkPlan, source: DiffusersFolder, work: Path, place: int) -> Origin:
    """Return the source as it was, for the pass at ``place``."""

    def load(name: str) -> Any:
        with quiet():
            return _load(source, name)

    rows = plan.recipe.passes
    files = [[str(path), describe_files(path)] for path in plan.request.files]
    given = plan.request.prompts
    return Origin(
        load=load,
        tokenizer=source.folder("tokenizer"),
        scheduler=source.configs["scheduler"],
        guidance_scale=suggestions(source, {})["guidance_scale"],
        prompts=prompts_of(source.path) if given is None else given,
        work=work / LEARNING,
        key=key_of(files, asdict(plan.request.baking)),
        passed_key=key_of(*done_to(rows[place].component, rows[:place])),
    )


def _load(source: DiffusersFolder, name: str) -> Any:
    """Return a component of the source as a torch module, with its LoRAs."""
    tensors = merge(source.tensors(name), source.loras, name)
    return load_module(name, source.configs[name], tensors, Structure.read(source.folder(name)))


def _diffusers(source: Source) -> DiffusersFolder:
    if isinstance(source, OpenVinoFolder):
        raise SdvinoError("Passes work on checkpoints alone.")  # `check_passes` has said so
    return source


def import_models() -> None:
    """Import the libraries of models as if what they bring along for others were not installed.

    They find out once what there is. NNCF, later, finds its scipy.
    """
    absent = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]


# Calls that the change of the output is measured on.
_SAMPLES = 4


def apply_pass(
    row: SourcePass,
    module: Any,
    structure: Structure,
    config: Mapping[str, Any],
    around: Context,
    output: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Do ``row`` to ``module``, changed in place, and write the component and its figures.

    ``output``/COMPONENT takes what `sdvino.train.modules.load_component` loads,
    ``output``/history.json what is returned: the row, weights and operations before and after,
    and how far the output moved on the inputs of ``around``, where there are any.
    Raises RequestError when the row does not fit the component.
    """
    samples = evenly(around.inputs, _SAMPLES)
    before = _figures(row.component, module, config, structure)
    references = outputs_of(module, samples)
    try:
        found = row.run(module, structure, around, lambda share: progress(0.05 + 0.85 * share))
    except RequestError as error:
        raise RequestError(f"{row.what} of {row.component}: {error}") from error
    after = _figures(row.component, found.module, config, found.structure)
    moved = relative_error(outputs_of(found.module, samples), references) if samples else None
    save_component(found.module, output / row.component, config=config, structure=found.structure)
    history = {
        "kind": row.kind,
        "component": row.component,
        "what": row.what,
        "settings": row.told(),
        "before": before,
        "after": after,
        "output_error": None if moved is None else round(moved, 5),
        "figures": found.figures,
    }
    (output / HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    return history


def _figures(
    component: str, module: Any, config: Mapping[str, Any], structure: Structure
) -> dict[str, int]:
    """Return weights, those that are not zero, and operations of one call at its own size."""
    parameters = list(module.parameters())
    with quiet():
        counts = operations(component, config, structure)
    return {
        "parameters": sum(one.numel() for one in parameters),
        "nonzero": sum(int(one.count_nonzero()) for one in parameters),
        "operations": sum(counts.values()),
    }
