"""`convert`: a diffusers folder becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.folder import compress_folder
from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts, read_prompts
from sdvino.compress.recipes import DEFAULT_RECIPE, Recipe, get_recipe
from sdvino.convert.export import export_component, require_libraries
from sdvino.convert.gating import GateSettings, float_copy, judge
from sdvino.convert.manifest import write_manifest
from sdvino.convert.scheduler import portable_scheduler
from sdvino.convert.source import PROMPTS_FILE, DiffusersFolder
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
    gate: GateSettings | None = GateSettings(),  # noqa: B008 (frozen)
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> ModelFolder:
    """Convert the diffusers folder ``source`` into the model folder ``folder``.

    recipe: fp16, int8-weights or int8 (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. prompts: what int8 is calibrated on; None takes the source's
    calibration_prompts.txt, or a general list. suggested: num_inference_steps, guidance_scale,
    scheduler. name: the model's name in the manifest; None takes the source folder's.
    gate: how the result is compared with the uncompressed pipeline and mended; None: not at all.
    progress: called with what is being done and the share done; say: with what the gate costs, and
    what it changes, in a line each.

    The folder appears when it is complete; after Ctrl-C or a failure there is nothing. The
    source is never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written) and SdvinoError (the libraries failed).
    """
    chosen = get_recipe(recipe).with_overrides({} if components is None else components)
    checked = DiffusersFolder.open(Path(source))
    target = Path(folder).absolute()
    if target.resolve() == checked.path.resolve() or target.resolve() in (
        checked.path.resolve().parents
    ):
        raise RequestError(f"{folder} is, or holds, the source; choose another name.")
    hints = suggestions(checked, {} if suggested is None else suggested)
    plan = _plan(checked, prompts, hints["guidance_scale"])
    with staged(target, overwrite=overwrite) as staging:
        _check_space(checked, staging)
        progress("import libraries", 0.0)
        require_libraries()
        sizes = {ours: checked.bytes_of(theirs) for ours, theirs in checked.components.items()}
        judged = gate is not None and any(chosen.treatment(name) != "fp16" for name in sizes)
        work = Work(sizes, chosen, plan, progress, gated=judged)
        _export(checked, staging, work)
        title = checked.name if name is None else name
        quality = None
        with float_copy(staging) as original:
            _compress(checked, staging, chosen, plan, work)
            if gate is not None and judged:
                verdict = judge(
                    original,
                    staging,
                    chosen,
                    gate,
                    name=title,
                    recompress=lambda recipe, parts: _compress(
                        checked, staging, recipe, plan, work, parts, source=original
                    ),
                    prompts=_texts(checked, prompts),
                    calibrated_on=plan.prompts,
                    suggested=hints,
                    progress=work.update,
                    say=say,
                )
                chosen, quality = verdict.recipe, verdict.to_dict()
        write_manifest(
            staging,
            checked.components,
            source=title,
            family=checked.family.name,
            recipe=chosen,
            suggested=hints,
            quality=quality,
        )
        ModelFolder.open(staging)  # what we would refuse to run is not delivered
    return ModelFolder.open(target)


def _plan(
    source: DiffusersFolder, prompts: Sequence[str] | None, guidance_scale: float
) -> CalibrationPlan:
    """Choose prompts and how many inputs are kept, by the size of the UNet."""
    texts = _texts(source, prompts)
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


def _texts(source: DiffusersFolder, prompts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompts that there are for this model."""
    if prompts is not None:
        return check_prompts(prompts)
    own = source.path / PROMPTS_FILE
    return read_prompts(own) if own.is_file() else GENERAL_PROMPTS


def _export(source: DiffusersFolder, folder: Path, work: Work) -> None:
    """Write everything but the manifest into ``folder``, in half precision."""
    _write_configs(source, folder)
    convert_tokenizer(source.path / "tokenizer", folder / "tokenizer")
    for name in source.components:
        work.update(f"export {name}", 0.0)
        export_component(source, name, folder / name)
        work.update(f"export {name}", 1.0)


def _compress(
    checked: DiffusersFolder,
    folder: Path,
    recipe: Recipe,
    plan: CalibrationPlan,
    work: Work,
    components: Sequence[str] | None = None,
    *,
    source: Path | None = None,
) -> None:
    """Compress all, or some, components of ``folder``, from the float IR in ``source``."""
    names = tuple(checked.components) if components is None else tuple(components)
    try:
        compress_folder(folder, names, recipe, plan=plan, progress=work.update, source=source)
    except RuntimeError as error:  # NNCF's and OpenVINO's exceptions
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SdvinoError(f"{checked.name} cannot be compressed: {what}") from error


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
