"""`convert`: a diffusers folder becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.folder import compress_folder
from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts, read_prompts
from sdvino.compress.recipes import DEFAULT_RECIPE, Recipe, get_recipe
from sdvino.convert.baking import BakingRequest, bake, baking_request
from sdvino.convert.export import export_component, require_libraries
from sdvino.convert.manifest import write_manifest
from sdvino.convert.open_source import Source, open_source
from sdvino.convert.scheduler import portable_scheduler
from sdvino.convert.source import PROMPTS_FILE
from sdvino.convert.staging import staged
from sdvino.convert.suggestions import suggestions
from sdvino.convert.tokenizer import convert_tokenizer
from sdvino.convert.work import Progress, Work, silent
from sdvino.errors import OutputError, RequestError, SdvinoError
from sdvino.model_folder import ModelFolder

# A UNet of Stable Diffusion's size takes seconds for each evaluation on a laptop, a small one
# milliseconds: trajectories, and the UNet inputs kept of them.
_LARGE_UNET_BYTES = 200_000_000
_LARGE_CALIBRATION = (8, 64)
_SMALL_CALIBRATION = (48, 256)


def convert(
    source: Path | str,
    folder: Path | str,
    *,
    recipe: str = DEFAULT_RECIPE,
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
    progress: Progress = silent,
) -> ModelFolder:
    """Convert ``source`` into the model folder ``folder``.

    source: a diffusers folder, a .safetensors checkpoint, an OpenVINO folder, or a hub id (see
    `sdvino.convert.open_source`, also for revision, offline, tokenizer and prediction_type).
    recipe: fp16, int8-weights or int8 (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. prompts: what int8 is calibrated on; None takes the source's
    calibration_prompts.txt, or a general list. suggested: num_inference_steps, guidance_scale,
    scheduler. name: the model's name in the manifest; None takes the source folder's.
    loras: files to merge into the weights, each a path, ``FILE:WEIGHT`` or (path, weight). vae: an
    AutoencoderKL in the source's place, tiny_vae: an AutoencoderTiny beside it; folders or files.
    progress: called with what is being done and the share done.

    The folder appears when it is complete; after Ctrl-C or a failure there is nothing. The
    source is never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written) and SdvinoError (the libraries failed).
    """
    chosen = get_recipe(recipe).with_overrides({} if components is None else components)
    baking = baking_request(loras, vae, tiny_vae)
    target = Path(folder).absolute()
    with _work_folder(target) as work:
        checked = open_source(
            source,
            work,
            revision=revision,
            offline=offline,
            tokenizer=None if tokenizer is None else Path(tokenizer),
            prediction_type=prediction_type,
            progress=progress,
        )
        checked = bake(checked, baking, work)
        return _convert(
            checked, target, chosen, prompts, suggested, name, overwrite, progress, baking
        )


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


def _convert(
    checked: Source,
    target: Path,
    chosen: Recipe,
    prompts: Sequence[str] | None,
    suggested: Mapping[str, Any] | None,
    name: str | None,
    overwrite: bool,
    progress: Progress,
    baking: BakingRequest,
) -> ModelFolder:
    if target.resolve() == checked.path.resolve() or target.resolve() in (
        checked.path.resolve().parents
    ):
        raise RequestError(f"{target} is, or holds, the source; choose another name.")
    if not checked.family.runs and any(chosen.treatment(c) == "int8" for c in checked.components):
        raise RequestError(
            f"{checked.name} is for {checked.family.title}, and int8 is calibrated on pictures made"
            " from text alone; choose --recipe int8-weights or fp16."
        )
    hints = suggestions(checked, {} if suggested is None else suggested)
    plan = _plan(checked, prompts, hints["guidance_scale"])
    with staged(target, overwrite=overwrite) as staging:
        _check_space(checked, staging)
        progress("import libraries", 0.0)
        require_libraries()
        sizes = {ours: checked.bytes_of(theirs) for ours, theirs in checked.components.items()}
        _write_parts(checked, staging, chosen, plan, Work(sizes, chosen, plan, progress))
        write_manifest(
            staging,
            checked.components,
            source=checked.name if name is None else name,
            family=checked.family.name,
            recipe=chosen,
            suggested=hints,
            baked=baking.to_manifest(),
        )
        ModelFolder.open(staging)  # what we would refuse to run is not delivered
    return ModelFolder.open(target)


def _plan(source: Source, prompts: Sequence[str] | None, guidance_scale: float) -> CalibrationPlan:
    """Choose prompts and how many inputs are kept, by the size of the UNet."""
    own = source.path / PROMPTS_FILE
    if prompts is not None:
        texts = check_prompts(prompts)
    else:
        texts = read_prompts(own) if own.is_file() else GENERAL_PROMPTS
    large = source.bytes_of("unet") >= _LARGE_UNET_BYTES
    trajectories, samples = _LARGE_CALIBRATION if large else _SMALL_CALIBRATION
    # Evenly from the whole list, which may be sorted.
    count = min(trajectories, len(texts))
    spread = tuple(texts[i * len(texts) // count] for i in range(count))
    return CalibrationPlan(
        prompts=spread,
        unet_samples=samples,
        guidance_scale=guidance_scale,
        shape=source.latent_shape,
    )


def _write_parts(
    source: Source, folder: Path, recipe: Recipe, plan: CalibrationPlan, work: Work
) -> None:
    """Write everything but the manifest into ``folder``."""
    _write_configs(source, folder)
    for tokenizer in source.tokenizers:
        convert_tokenizer(source.folder(tokenizer), folder / tokenizer)
    for name in source.components:
        work.update(f"export {name}", 0.0)
        export_component(source, name, folder / name)
        work.update(f"export {name}", 1.0)
    try:
        compress_folder(folder, tuple(source.components), recipe, plan=plan, progress=work.update)
    except RuntimeError as error:  # NNCF's and OpenVINO's exceptions
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SdvinoError(f"{source.name} cannot be compressed: {what}") from error


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
