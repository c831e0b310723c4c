"""Passes over the source's weights as steps of a conversion.

The step `record` runs the source's own pipeline and writes what its components were called with to
inputs/; `pass 2-low_rank` makes passes/2-low_rank/COMPONENT of the folder that the pass before it
made, or of the source. Export then takes the last one in the source's place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.passes import SourcePass
from sdvino.compress.prompts import evenly
from sdvino.compress.recipes import Recipe
from sdvino.convert.metadata import tool_versions
from sdvino.convert.open_source import Source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.request import WorkPlan
from sdvino.convert.state import key_of
from sdvino.convert.steps import Step
from sdvino.convert.suggestions import suggestions
from sdvino.errors import RequestError

PASSES = "passes"
INPUTS = "inputs"
LEARNING = "learning"
HISTORY_FILE = "history.json"

# Which weights matter shows on far fewer inputs than where activations end: a UNet of Stable
# Diffusion's size takes seconds for each in torch.
_LARGE_UNET_BYTES = 200_000_000
_LARGE = {"trajectories": 4, "strata": 4, "samples": 12}
_SMALL = {"trajectories": 16, "strata": 8, "samples": 64}


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


def plan_for_passes(plan: CalibrationPlan, unet_bytes: int) -> CalibrationPlan:
    """Return ``plan`` with as many inputs as passes need, and no more than it has."""
    most = _LARGE if unet_bytes >= _LARGE_UNET_BYTES else _SMALL
    return replace(
        plan,
        prompts=tuple(evenly(plan.prompts, most["trajectories"])),
        strata=min(most["strata"], plan.strata),
        unet_samples=min(most["samples"], plan.unet_samples),
    )


def recording(plan: WorkPlan, source: Source) -> CalibrationPlan:
    """Return what the step `record` records: how the source is used, before any pass."""
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
        basis = key_of(origin, asdict(recording(plan, source)), sorted({r.component for r in rows}))
        steps.append((Step("record", "", source.bytes_of("unet")), basis))
    for place, row in enumerate(rows):
        key = key_of(basis, *done_to(row.component, rows[: place + 1]))
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


def done_to(folder: str, rows: tuple[SourcePass, ...]) -> list[list[Any]]:
    """Return kind and settings of the ``rows`` over a sub-folder, for keys."""
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
