"""`convert`: a diffusers folder becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan, make_plan
from sdvino.compress.folder import compress_folder
from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts, read_prompts
from sdvino.compress.recipes import DEFAULT_RECIPE, CalibrationRecipe, Recipe, get_recipe
from sdvino.compress.targets import Target, get_target
from sdvino.compress.verdict import Verdict
from sdvino.convert.baking import BakingRequest, bake, baking_request
from sdvino.convert.export import export_component, require_libraries
from sdvino.convert.gating import GateSettings, float_copy, judge
from sdvino.convert.manifest import write_manifest
from sdvino.convert.open_source import Source, open_source
from sdvino.convert.scheduler import portable_scheduler
from sdvino.convert.source import PROMPTS_FILE
from sdvino.convert.staging import staged
from sdvino.convert.suggestions import suggestions
from sdvino.convert.tokenizer import convert_tokenizer
from sdvino.convert.work import Progress, Work, silent
from sdvino.errors import OutputError, RequestError
from sdvino.model_folder import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What a conversion was asked to do with its source."""

    recipe: Recipe
    target: Target
    prompts: Sequence[str] | None
    suggested: Mapping[str, Any]
    name: str | None
    baking: BakingRequest
    overwrite: bool
    gate: GateSettings | None
    progress: Progress
    say: Callable[[str], None]


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
    revision: str | None = None,
    offline: bool = False,
    tokenizer: Path | str | None = None,
    prediction_type: str | None = None,
    loras: Sequence[str | Path | tuple[str | Path, float]] = (),
    vae: Path | str | None = None,
    tiny_vae: Path | str | None = None,
    gate: GateSettings | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> ModelFolder:
    """Convert ``source`` into the model folder ``folder``.

    source: a diffusers folder, a .safetensors checkpoint, an OpenVINO folder, or a hub id (see
    `sdvino.convert.open_source`, also for revision, offline, tokenizer and prediction_type).
    recipe: a name or a TOML file (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. target: the machine that int8 is made for (see
    `sdvino.compress.targets`). prompts: what int8 is calibrated on; None takes the recipe's, the
    source's calibration_prompts.txt, or a general list. suggested: num_inference_steps,
    guidance_scale, scheduler. name: the model's name in the manifest; None takes the source's.
    loras: files to merge into the weights, each a path, ``FILE:WEIGHT`` or (path, weight). vae: an
    AutoencoderKL in the source's place, tiny_vae: an AutoencoderTiny beside it; folders or files.
    gate: how the result is compared with the uncompressed pipeline and mended (the command line's
    default is `GateSettings()`); None: not at all. progress: called with what is being done and
    the share done; say: with what the gate costs and what it changes, in a line each.

    The folder appears when it is complete; after Ctrl-C or a failure there is nothing. The
    source is never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written) and SdvinoError (the libraries failed).
    """
    options = _Options(
        recipe=get_recipe(recipe).with_overrides({} if components is None else components),
        target=get_target(target),
        prompts=prompts,
        suggested={} if suggested is None else suggested,
        name=name,
        baking=baking_request(loras, vae, tiny_vae),
        overwrite=overwrite,
        gate=gate,
        progress=progress,
        say=say,
    )
    goal = Path(folder).absolute()
    with _work_folder(goal) as work:
        checked = open_source(
            source,
            work,
            revision=revision,
            offline=offline,
            tokenizer=None if tokenizer is None else Path(tokenizer),
            prediction_type=prediction_type,
            progress=progress,
        )
        return _convert(bake(checked, options.baking, work), goal, options)


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """Give a folder that is gone afterwards, on the disk that ``target`` is for."""
    standing = next(folder for folder in target.parents if folder.is_dir())
    try:
        work = Path(tempfile.mkdtemp(prefix=".sdvino-", dir=standing))
    except OSError as error:
        raise OutputError(
            f"{standing} cannot be written ({error.strerror}); choose another folder."
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(source: Source, goal: Path, options: _Options) -> ModelFolder:
    if goal.resolve() == source.path.resolve() or goal.resolve() in source.path.resolve().parents:
        raise RequestError(f"{goal} is, or holds, the source; choose another name.")
    _check_calibration(source, options.recipe)
    hints = suggestions(source, options.suggested)
    plan = _plan(source, options.recipe.calibration, options.prompts, hints["guidance_scale"])
    recipe, quality = options.recipe, None
    with staged(goal, overwrite=options.overwrite) as staging:
        _check_space(source, staging)
        options.progress("import libraries", 0.0)
        require_libraries()
        sizes = {ours: source.bytes_of(theirs) for ours, theirs in source.components.items()}
        work = Work(sizes, recipe, plan, options.progress, gated=options.gate is not None)
        _export(source, staging, work)
        if options.gate is None:
            _compress(source, staging, recipe, options, plan, work)
        else:
            with float_copy(staging) as original:
                _compress(source, staging, recipe, options, plan, work)
                verdict = _judge(source, original, staging, options, plan, hints, work)
            recipe, quality = verdict.recipe, verdict.to_dict()
        write_manifest(
            staging,
            source.components,
            source=source.name if options.name is None else options.name,
            family=source.family.name,
            recipe=recipe,
            suggested=hints,
            baked=options.baking.to_manifest(),
            quality=quality,
        )
        ModelFolder.open(staging)  # what we would refuse to run is not delivered
    return ModelFolder.open(goal)


def _judge(
    source: Source,
    original: Path,
    folder: Path,
    options: _Options,
    plan: CalibrationPlan,
    hints: Mapping[str, Any],
    work: Work,
) -> Verdict:
    """Hold ``folder`` against the float model in ``original``, and mend it until it passes."""
    assert options.gate is not None

    def recompress(recipe: Recipe, parts: Sequence[str]) -> None:
        _compress(source, folder, recipe, options, plan, work, parts, original=original)

    return judge(
        original,
        folder,
        options.recipe,
        options.gate,
        name=source.name if options.name is None else options.name,
        recompress=recompress,
        prompts=options.recipe.calibration.prompts or _texts(source, options.prompts),
        calibrated_on=plan.prompts,
        suggested=hints,
        progress=work.update,
        say=options.say,
    )


def _check_calibration(source: Source, recipe: Recipe) -> None:
    """Raise RequestError where activations were to be quantized and cannot be calibrated."""
    if not any(recipe.component(name).calibrated for name in source.components):
        return
    family = source.family
    unet = source.configs["unet"]
    if not family.runs:
        raise RequestError(
            f"{source.name} is for {family.title}, and {recipe.name} is calibrated on pictures made"
            " from text alone; choose --recipe int8-weights or fp16."
        )
    if len(family.text_encoders) > 1 or unet.get("time_cond_proj_dim") is not None:
        raise RequestError(
            f"{source.name} is {family.title}, for which {recipe.name} cannot be calibrated yet;"
            " choose --recipe int8-weights, int4-weights or fp16."
        )


def _plan(
    source: Source,
    recipe: CalibrationRecipe,
    prompts: Sequence[str] | None,
    guidance_scale: float,
) -> CalibrationPlan:
    """Return what is calibrated on: the prompts given, the recipe's, the source's, or ours."""
    if prompts is not None:
        recipe = replace(recipe, prompts=check_prompts(prompts))
    return make_plan(
        recipe,
        _texts(source, None),
        unet_bytes=source.bytes_of("unet"),
        guidance_scale=guidance_scale,
        shape=source.latent_shape,
    )


def _texts(source: Source, prompts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompts there are for this model: those given, its own, or ours."""
    if prompts is not None:
        return check_prompts(prompts)
    own = source.path / PROMPTS_FILE
    return read_prompts(own) if own.is_file() else GENERAL_PROMPTS


def _export(source: Source, folder: Path, work: Work) -> None:
    """Write everything but the manifest into ``folder``, in half precision."""
    _write_configs(source, folder)
    for tokenizer in source.tokenizers:
        convert_tokenizer(source.folder(tokenizer), folder / tokenizer)
    for name in source.components:
        work.update(f"export {name}", 0.0)
        export_component(source, name, folder / name)
        work.update(f"export {name}", 1.0)


def _compress(
    source: Source,
    folder: Path,
    recipe: Recipe,
    options: _Options,
    plan: CalibrationPlan,
    work: Work,
    components: Sequence[str] | None = None,
    *,
    original: Path | None = None,
) -> None:
    """Compress all, or some, components of ``folder``, from the float IR in ``original``."""
    names = tuple(source.components) if components is None else tuple(components)
    compress_folder(
        folder,
        names,
        recipe,
        plan=plan,
        target=options.target,
        progress=work.update,
        source=original,
    )


def _write_configs(source: Source, folder: Path) -> None:
    """Write model_index.json and each component's config, without paths or a safety checker."""
    index = {key: value for key, value in source.model_index.items() if key != "_name_or_path"}
    absent = ["feature_extractor", "image_encoder"]
    if len(source.family.text_encoders) == 1:  # SDXL's pipelines know no safety checker
        absent.append("safety_checker")
        index["requires_safety_checker"] = False
    index.update({name: [None, None] for name in absent})
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


def _check_space(source: Source, folder: Path) -> None:
    """Raise OutputError when the disk cannot hold the model while it is made."""
    largest = max(source.bytes_of(name) for name in source.weights)
    needed = largest + sum(source.bytes_of(theirs) for theirs in source.components.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"Converting needs {needed / 1e9:.1f} GB on the disk of the target and"
            f" {free / 1e9:.1f} GB are free; free some space or choose another folder."
        )
