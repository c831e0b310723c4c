"""`convert`: a checkpoint becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import FEW_STEPS, CalibrationPlan, make_plan
from sdvino.compress.gate import Gate
from sdvino.compress.prompts import check_prompts, held_back, prompts_of
from sdvino.compress.recipes import DEFAULT_RECIPE, RECIPES, Recipe
from sdvino.compress.report import write_report
from sdvino.compress.targets import get_target
from sdvino.compress.thresholds import GateSettings
from sdvino.convert.baking import baking_request
from sdvino.convert.conversion import Conversion, origin_of, steps_of
from sdvino.convert.estimate import Needs, StepNeeds, check_needs, work_out
from sdvino.convert.export import EXPORTERS, Exporter
from sdvino.convert.metadata import is_distilled
from sdvino.convert.open_source import Source, is_here, resolve_source
from sdvino.convert.request import Request, WorkPlan, require_libraries
from sdvino.convert.source_passes import check_passes, suggested_after
from sdvino.convert.staging import check_target
from sdvino.convert.state import WorkFolder, recorded_steps
from sdvino.convert.steps import Progress, silent
from sdvino.convert.suggestions import check_suggestions, suggestions, trained_steps
from sdvino.errors import Cancelled, RequestError, SdvinoError
from sdvino.folder.hub import Hub
from sdvino.folder.index import ModelFolder
from sdvino.folder.manifest import Suggested
from sdvino.inputs.files import user_path
from sdvino.settings import check_choice

#: Tells a person, in a line, what the gate costs and what it changes.
Say = Callable[[str], None]

# Share of the whole that is done when the gate begins.
_GATE_FROM = 0.8


def convert(
    source: Path | str,
    folder: Path | str,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress = silent,
    say: Say = lambda line: None,
    **options: Any,
) -> ModelFolder:
    """Convert ``source`` into the model folder ``folder``; ``options`` are those of `make_request`.

    fresh: do not continue what an earlier, interrupted conversion to ``folder`` finished. progress:
    called with what is being done and the share done; say: with what the gate costs and what it
    changes, in a line each.

    The folder appears when it is complete. After Ctrl-C, a crash or a failure the finished steps
    stay in `.NAME.sdvino-partial` beside it, and the same call continues from them. The source is
    never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written), SdvinoError (the libraries failed) and Cancelled (Ctrl-C).
    """
    request = make_request(source, **options)
    return run(request, Path(folder), overwrite=overwrite, fresh=fresh, progress=progress, say=say)


def make_request(
    source: Path | str,
    *,
    recipe: str | Path = DEFAULT_RECIPE,
    target: str = "auto",
    components: Mapping[str, str] | None = None,
    prompts: Sequence[str] | None = None,
    suggested: Mapping[str, Any] | None = None,
    name: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    max_download: int | None = None,
    tokenizer: Path | str | None = None,
    prediction_type: str | None = None,
    loras: Sequence[str | Path | tuple[str | Path, float]] = (),
    vae: Path | str | None = None,
    tiny_vae: Path | str | None = None,
    gate: GateSettings | None = None,
    exporter: Exporter = "sdvino",
    download: bool = True,
) -> Request:
    """Return what is asked of a conversion; raises RequestError for what is absurd.

    source: a diffusers folder, a .safetensors checkpoint, an OpenVINO folder, or a hub id (see
    `sdvino.convert.open_source`, also for tokenizer and prediction_type; for revision, offline and
    max_download see `sdvino.folder.hub.Hub`). It is downloaded here; without ``download`` the
    request is for `look_ahead` alone.
    recipe: a name or a TOML file (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. target: the machine that int8 is made for (see
    `sdvino.compress.targets`). prompts: what int8 is calibrated on; None takes the recipe's, the
    source's calibration_prompts.txt, or a general list. suggested: num_inference_steps,
    guidance_scale, scheduler. name: the model's name in the manifest; None takes the source's.
    loras: files to merge into the weights, each a path, ``FILE:WEIGHT`` or (path, weight). vae: an
    AutoencoderKL in the source's place, tiny_vae: an AutoencoderTiny beside it; folders or files.
    gate: how the result is compared with the uncompressed pipeline and mended (the command line's
    default is `GateSettings()`); None: not at all. exporter: who writes the graphs, "sdvino" itself
    or "optimum-intel", which needs torch and knows more networks.
    """
    check_choice("exporter", exporter, EXPORTERS)
    request = Request(
        source="",
        recipe=str(recipe) if recipe in RECIPES else str(Path(recipe).absolute()),
        target=get_target(target).name,
        components={} if components is None else dict(components),
        prompts=None if prompts is None else check_prompts(prompts),
        suggested=None if suggested is None else dict(suggested),
        name=name,
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
        prediction_type=prediction_type,
        baking=baking_request(loras, vae, tiny_vae),
        gate=gate,
        exporter=exporter,
    )
    request.resolve_recipe()  # before anything is downloaded
    if not download and not is_here(source):
        return replace(
            request,
            source_name=str(source),
            revision=revision,
            offline=offline,
            max_download=max_download,
        )
    hub = Hub(revision=revision, offline=offline, max_download=max_download)
    path = resolve_source(source, hub).absolute()
    here = path == user_path(source).absolute()
    return replace(request, source=str(path), source_name=None if here else str(source))


def run(
    request: Request,
    folder: Path,
    *,
    overwrite: bool,
    fresh: bool,
    progress: Progress,
    say: Say = lambda line: None,
) -> ModelFolder:
    """Do the conversion that ``request`` describes; see `convert`."""
    recipe = request.resolve_recipe()
    require_libraries(recipe, request.exporter, gated=request.gate is not None)
    target = folder.absolute()
    _check_apart(Path(request.source), target)
    work = WorkFolder(target)
    conversion = None
    try:
        source = request.open_source(work.path, say=True)
        plan, hints = _decide(request, recipe, source)
        steps = progress if request.gate is None else _scaled(progress, 0.0, _GATE_FROM)
        conversion = Conversion(source, plan, hints, work, steps)
        if conversion.delivered:
            work.close(remove=True)
            return ModelFolder.open(target)
        check_target(target, overwrite=overwrite)
        if fresh:
            work.start_anew()
        check_needs(work_out(conversion.left(), conversion.plan), work.path)
        conversion.run()
        if request.gate is not None and not conversion.gated:
            apply_gate(conversion, request.gate, _scaled(progress, _GATE_FROM, 1.0), say)
        conversion.finish(overwrite=overwrite)
    except BaseException as error:
        keep = work.has_progress and (conversion is None or conversion.worth_keeping(error))
        work.close(remove=not keep)
        if not keep or conversion is None or not conversion.started:
            raise
        if isinstance(error, KeyboardInterrupt):
            raise Cancelled(f"Cancelled; {_how_to_go_on(work)}") from error
        if isinstance(error, SdvinoError):
            raise type(error)(f"{error} ({_how_to_go_on(work)})") from error
        raise
    return ModelFolder.open(target)


def _scaled(progress: Progress, start: float, end: float) -> Progress:
    """Return a progress that goes from ``start`` to ``end`` of another."""
    return lambda what, share: progress(what, start + (end - start) * share)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a conversion would do, and what it would need."""

    source: Source
    recipe: Recipe
    #: What the worker processes would be told.
    plan: WorkPlan
    #: What every step takes.
    steps: tuple[StepNeeds, ...]
    #: Names of the steps that an interrupted conversion has finished.
    finished: frozenset[str]
    #: What the other steps take together.
    needs: Needs
    #: Bytes that are downloaded from the hub before them.
    download: int = 0


def look_ahead(
    request: Request, folder: Path, *, overwrite: bool = False, fresh: bool = False
) -> Outlook:
    """Tell what `run` would do, without doing it or writing anything.

    Of a model on the hub only what is small is downloaded; whether LoRAs fit it is not known then.
    Raises what `run` would raise before its first step, but for a disk or memory too small.
    """
    recipe = request.resolve_recipe()
    target = folder.absolute()
    if request.source:
        _check_apart(Path(request.source), target)
    check_target(target, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="sdvino-") as scratch:
        source, download = request.outline_source(Path(scratch))
        plan, _ = _decide(request, recipe, source)
        steps = steps_of(source, plan, origin_of(plan))
        known = {} if fresh else recorded_steps(target)
        everything = work_out([step for step, _ in steps], plan)
    finished = frozenset(step.name for step, key in steps if known.get(step.name) == key)
    left = [step for step, _ in steps if step.name not in finished]
    needs = work_out(left, plan)
    return Outlook(source, recipe, plan, everything.steps, finished, needs, download)


def _decide(request: Request, recipe: Recipe, source: Source) -> tuple[WorkPlan, Mapping[str, Any]]:
    """Return what the worker processes are to do, and what the folder will suggest."""
    check_passes(source, recipe)
    _check_calibration(source, recipe)
    given = {} if request.suggested is None else request.suggested
    hints = suggestions(source, {**suggested_after(recipe), **check_suggestions(given)})
    plan = WorkPlan(
        request=request,
        recipe=recipe,
        calibration=_plan(source, recipe, request.prompts, hints),
        components=tuple(source.components),
    )
    return plan, hints


def apply_gate(
    conversion: Conversion, settings: GateSettings, progress: Progress, say: Say
) -> None:
    """Compare the compressed model with the float one, and mend it until it is good enough."""
    plan, source, work = conversion.plan, conversion.source, conversion.work
    own = plan.recipe.calibration.prompts
    texts = own if own else _texts(source, plan.request.prompts)
    verdict = Gate(
        float_folder=work.float,
        folder=work.model,
        recipe=plan.recipe,
        recompress=conversion.recompress,
        prompts=held_back(texts, plan.calibration.prompts),
        settings=settings,
        suggested=Suggested(**conversion.suggested),
        # What was enough to make the model is enough to judge it.
        max_memory=work_out([step for step, _ in conversion.steps()], plan).memory,
        progress=progress,
        say=say,
    ).run()
    if verdict.comparison is not None:
        name = source.name if plan.request.name is None else plan.request.name
        write_report(work.model, verdict, name=name)
    conversion.plan = replace(plan, recipe=verdict.recipe)
    conversion.record_quality(verdict.to_dict())


def _check_calibration(source: Source, recipe: Recipe) -> None:
    """Raise RequestError where activations were to be quantized and cannot be calibrated."""
    if not any(recipe.component(name).calibrated for name in source.components):
        return
    family = source.family
    if not family.runs:
        raise RequestError(
            f"{source.name} is for {family.title}, and {recipe.name} is calibrated on pictures made"
            " from text alone; choose --recipe int8-weights or fp16."
        )


def _plan(
    source: Source,
    whole: Recipe,
    prompts: Sequence[str] | None,
    hints: Mapping[str, Any],
) -> CalibrationPlan:
    """Return what is calibrated on: the prompts given, the recipe's, the source's, or ours.

    ``hints`` are steps, guidance and sampler, as the folder will suggest them.
    """
    recipe = whole.calibration
    if prompts is not None:
        recipe = replace(recipe, prompts=tuple(prompts))
    steps = suggested_after(whole).get("num_inference_steps", trained_steps(source))
    distilled = source.family.distilled or is_distilled(source.configs["scheduler"])
    return make_plan(
        recipe,
        _texts(source, None),
        unet_bytes=source.bytes_of("unet"),
        guidance_scale=hints["guidance_scale"],
        shape=source.latent_shape,
        distilled=hints["scheduler"] if distilled or steps is not None else None,
        few_steps=FEW_STEPS if steps is None else (steps,),
        embedded_guidance=source.configs["unet"].get("time_cond_proj_dim") is not None,
    )


def _texts(source: Source, prompts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompts there are for this model: those given, its own, or ours."""
    if prompts is not None:
        return tuple(prompts)
    return prompts_of(source.path)


def _check_apart(source: Path, target: Path) -> None:
    real = source.resolve()
    if target.resolve() == real or target.resolve() in real.parents:
        raise RequestError(f"{target} is, or holds, the source; choose another name.")


def _how_to_go_on(work: WorkFolder) -> str:
    return (
        f"the finished steps are kept in {work.path}: run the same command again to continue,"
        " or delete that folder"
    )
