"""Passes over the source's weights as steps of a conversion.

The step `gather` runs the source's own pipeline and writes what its components were called with to
inputs/; `pass 2-low_rank` makes passes/2-low_rank/COMPONENT of the folder that the pass before it
made, or of the source. Export then takes the last one in the source's place.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdvino.compress.apply import HISTORY_FILE, apply_pass
from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.passes import Origin, SourcePass, Surroundings
from sdvino.compress.prompts import prompts_of
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import Recipe
from sdvino.compress.samples import load_samples, save_samples
from sdvino.compress.source_inputs import TorchPipeline, plan_for_passes, record
from sdvino.compress.structure import load_component, load_module
from sdvino.convert.manifest import tool_versions
from sdvino.convert.open_source import Source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.request import WorkPlan
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.state import describe_files, key_of
from sdvino.convert.steps import Step
from sdvino.convert.suggestions import suggestions
from sdvino.errors import RequestError, SdvinoError
from sdvino.nets.structure import Structure
from sdvino.weights.lora_merge import merge

PASSES = "passes"
INPUTS = "inputs"
LEARNING = "learning"


def check_passes(source: Source, recipe: Recipe) -> None:
    """Raise RequestError for passes that ``source`` does not bear, before anything is loaded."""
    if not recipe.passes:
        return
    if isinstance(source, OpenVinoFolder):
        raise RequestError(
            f"{source.name} is an OpenVINO model, whose weights are fixed; give the checkpoint that"
            f" it was made from, or leave the passes out of {recipe.name}."
        )
    for row in recipe.passes:
        if row.component not in source.components.values():
            raise RequestError(
                f"{source.name} has no {row.component} for {row.kind} to work on; correct the pass."
            )
        row.check(source.configs["scheduler"])
    plain = len(source.family.text_encoders) == 1 and source.family.runs
    plain = plain and source.configs["unet"].get("time_cond_proj_dim") is None
    if any(row.needs_origin for row in recipe.passes) and not plain:
        raise RequestError(
            f"{source.name} is {source.family.title}, which cannot teach a student yet; leave"
            " distill out."
        )
    if any(row.needs_inputs for row in recipe.passes) and not plain:
        raise RequestError(
            f"{source.name} is {source.family.title}, whose activations cannot be measured before"
            " it is exported yet; choose passes without: prune by magnitude, or low_rank with"
            " whiten = false."
        )


def name_of(recipe: Recipe, place: int) -> str:
    """Return what the pass at ``place``, from 0, is called in steps and folders."""
    return f"{place + 1}-{recipe.passes[place].kind}"


def gathering(plan: WorkPlan, source: Source) -> CalibrationPlan:
    """Return what the step `gather` records: how the source is used, before any pass."""
    calibration = plan.calibration
    if suggested_after(plan.recipe):
        guidance = suggestions(source, {})["guidance_scale"]
        calibration = replace(calibration, guidance_scale=guidance, few_steps=(), sampler="euler")
    return plan_for_passes(calibration, source.bytes_of("unet"))


def suggested_after(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe's passes make the model suggest, in the source's place."""
    found: dict[str, Any] = {}
    for row in recipe.passes:
        found |= row.suggested_after()
    return found


def scheduled_after(source: Source, recipe: Recipe) -> Source:
    """Return ``source`` with the scheduler that the recipe's passes make the model for."""
    if isinstance(source, OpenVinoFolder):
        return source
    scheduler = source.configs["scheduler"]
    for row in recipe.passes:
        scheduler = row.scheduler_after(scheduler)
    return replace(source, configs={**source.configs, "scheduler": scheduler})


def pass_steps(source: Source, plan: WorkPlan, origin: str) -> list[tuple[Step, str]]:
    """Return the steps of the recipe's passes, each with the key of what it is made from."""
    rows = plan.recipe.passes
    steps: list[tuple[Step, str]] = []
    basis = origin = key_of(origin, tool_versions(trained=True))
    if any(row.needs_inputs for row in rows):
        basis = key_of(origin, asdict(gathering(plan, source)), sorted({r.component for r in rows}))
        steps.append((Step("gather", "", source.bytes_of("unet")), basis))
    for place, row in enumerate(rows):
        key = key_of(basis, *_done_to(row.component, rows[: place + 1]))
        size = source.bytes_of(row.component)
        steps.append((Step("pass", name_of(plan.recipe, place), size), key))
    return steps


def export_key(source: Source, plan: WorkPlan, component: str, origin: str) -> str:
    """Return the key of the export of ``component``: that of the last pass over it, or of all."""
    place = _last_over(source.components[component], plan.recipe)
    if place is None:
        return origin
    keys = {step.component: key for step, key in pass_steps(source, plan, origin)}
    return keys[name_of(plan.recipe, place)]


def _done_to(folder: str, rows: tuple[SourcePass, ...]) -> list[list[Any]]:
    return [[row.kind, asdict(row)] for row in rows if row.component == folder]


def passed_folder(
    work: Path, recipe: Recipe, folder: str, before: int | None = None
) -> Path | None:
    """Return where the last pass over ``folder`` (of those ``before`` a place) put it, or None."""
    place = _last_over(folder, recipe, before)
    return None if place is None else work / PASSES / name_of(recipe, place) / folder


def _last_over(folder: str, recipe: Recipe, before: int | None = None) -> int | None:
    places = [i for i, row in enumerate(recipe.passes[:before]) if row.component == folder]
    return places[-1] if places else None


def with_passes(source: Source, plan: WorkPlan, work: Path, component: str) -> Source:
    """Return ``source`` with what passes made of the sub-folder that ``component`` is in."""
    if isinstance(source, OpenVinoFolder):
        return source
    name = source.components[component]
    folder = passed_folder(work, plan.recipe, name)
    if folder is None:
        return source
    # LoRAs went in before the first pass.
    return replace(source.with_folder(name, folder), loras=())


def history_of(work: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Return what the finished passes wrote down, in order."""
    found = []
    for place in range(len(recipe.passes)):
        path = work / PASSES / name_of(recipe, place) / HISTORY_FILE
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


# --- in the worker


def gather(plan: WorkPlan, source: Source, output: Path, progress: Callable[[float], None]) -> None:
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
            guided=gathering(plan, source).branches == 2,
            decodes="vae" in wanted,
        )
    calls = record(pipeline, gathering(plan, source), wanted, progress)
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
    around = Surroundings(inputs=inputs, origin=_origin(plan, source, work, place))
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
        passed_key=key_of(*_done_to(rows[place].component, rows[:place])),
    )


def _load(source: DiffusersFolder, name: str) -> Any:
    """Return a component of the source as a torch module, with its LoRAs."""
    tensors = merge(source.tensors(name), source.loras, name)
    return load_module(name, source.configs[name], tensors, Structure.read(source.folder(name)))


def _diffusers(source: Source) -> DiffusersFolder:
    if isinstance(source, OpenVinoFolder):
        raise SdvinoError("Passes work on checkpoints alone.")  # `check_passes` has said so
    return source
