"""`convert`: a diffusers folder becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan, make_plan
from sdvino.compress.folder import compress_folder
from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts, read_prompts
from sdvino.compress.recipes import DEFAULT_RECIPE, CalibrationRecipe, Recipe, get_recipe
from sdvino.compress.targets import Target, get_target
from sdvino.convert.export import export_component, require_libraries
from sdvino.convert.manifest import write_manifest
from sdvino.convert.scheduler import portable_scheduler
from sdvino.convert.source import PROMPTS_FILE, DiffusersFolder
from sdvino.convert.staging import staged
from sdvino.convert.suggestions import suggestions
from sdvino.convert.tokenizer import convert_tokenizer
from sdvino.convert.work import Progress, Work, silent
from sdvino.errors import OutputError, RequestError
from sdvino.model_folder import ModelFolder


def convert(
    source: Path | str,
    folder: Path | str,
    *,
    recipe: str | Path = DEFAULT_RECIPE,
    target: str = "auto",
    components: Mapping[str, str] | None = None,
    prompts: Sequence[str] | None = None,
    suggested: Mapping[str, Any] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ModelFolder:
    """Convert the diffusers folder ``source`` into the model folder ``folder``.

    recipe: a name or a TOML file (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. target: the machine that int8 is made for (see
    `sdvino.compress.targets`). prompts: what int8 is calibrated on; None takes the recipe's, the
    source's calibration_prompts.txt, or a general list. suggested: num_inference_steps,
    guidance_scale, scheduler. name: the model's name in the manifest; None takes the source
    folder's. progress: called with what is being done and the share done.

    The folder appears when it is complete; after Ctrl-C or a failure there is nothing. The
    source is never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written) and SdvinoError (the libraries failed).
    """
    chosen = get_recipe(recipe).with_overrides({} if components is None else components)
    checked = DiffusersFolder.open(Path(source))
    made_for = get_target(target)
    goal = Path(folder).absolute()
    if goal.resolve() == checked.path.resolve() or goal.resolve() in (
        checked.path.resolve().parents
    ):
        raise RequestError(f"{folder} is, or holds, the source; choose another name.")
    hints = suggestions(checked, {} if suggested is None else suggested)
    plan = _plan(checked, chosen.calibration, prompts, hints["guidance_scale"])
    with staged(goal, overwrite=overwrite) as staging:
        _check_space(checked, staging)
        progress("import libraries", 0.0)
        require_libraries()
        sizes = {ours: checked.bytes_of(theirs) for ours, theirs in checked.components.items()}
        work = Work(sizes, chosen, plan, progress)
        _write_parts(checked, staging, chosen, plan, made_for, work)
        write_manifest(
            staging,
            checked.components,
            source=checked.name if name is None else name,
            family=checked.family.name,
            recipe=chosen,
            suggested=hints,
        )
        ModelFolder.open(staging)  # what we would refuse to run is not delivered
    return ModelFolder.open(goal)


def _plan(
    source: DiffusersFolder,
    recipe: CalibrationRecipe,
    prompts: Sequence[str] | None,
    guidance_scale: float,
) -> CalibrationPlan:
    """Return what is calibrated on: the prompts given, the recipe's, the source's, or ours."""
    own = source.path / PROMPTS_FILE
    if prompts is not None:
        recipe = replace(recipe, prompts=check_prompts(prompts))
    texts = read_prompts(own) if own.is_file() else GENERAL_PROMPTS
    return make_plan(
        recipe,
        texts,
        unet_bytes=source.bytes_of("unet"),
        guidance_scale=guidance_scale,
        shape=source.latent_shape,
    )


def _write_parts(
    source: DiffusersFolder,
    folder: Path,
    recipe: Recipe,
    plan: CalibrationPlan,
    target: Target,
    work: Work,
) -> None:
    """Write everything but the manifest into ``folder``."""
    _write_configs(source, folder)
    convert_tokenizer(source.path / "tokenizer", folder / "tokenizer")
    for name in source.components:
        work.update(f"export {name}", 0.0)
        export_component(source, name, folder / name)
        work.update(f"export {name}", 1.0)
    names = tuple(source.components)
    compress_folder(folder, names, recipe, plan=plan, target=target, progress=work.update)


def _write_configs(source: DiffusersFolder, folder: Path) -> None:
    """Write model_index.json and each component's config, without paths or a safety checker."""
    index = {key: value for key, value in source.model_index.items() if key != "_name_or_path"}
    for absent in ("safety_checker", "feature_extractor", "image_encoder"):
        index[absent] = [None, None]
    index["requires_safety_checker"] = False
    scheduler = portable_scheduler(source.configs["scheduler"])
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for ours, theirs in source.components.items():
        config = {
            key: value for key, value in source.configs[theirs].items() if key != "_name_or_path"
        }
        _write_json(folder / ours / "config.json", config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_space(source: DiffusersFolder, folder: Path) -> None:
    """Raise OutputError when the disk cannot hold the model while it is made."""
    largest = max(source.bytes_of(name) for name in source.weights)
    needed = largest + sum(source.bytes_of(theirs) for theirs in source.components.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"Converting needs {needed / 1e9:.1f} GB on the disk of the target and"
            f" {free / 1e9:.1f} GB are free; free some space or choose another folder."
        )
