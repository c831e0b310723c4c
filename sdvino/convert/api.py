"""`convert`: a checkpoint becomes an OpenVINO model folder, complete or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts, read_prompts
from sdvino.compress.recipes import DEFAULT_RECIPE, Recipe
from sdvino.convert.conversion import Conversion, origin_of, steps_of
from sdvino.convert.estimate import Needs, StepNeeds, check_needs, work_out
from sdvino.convert.export import require_libraries
from sdvino.convert.request import Request, WorkPlan
from sdvino.convert.source import PROMPTS_FILE, DiffusersFolder
from sdvino.convert.staging import check_target
from sdvino.convert.state import WorkFolder, recorded_steps
from sdvino.convert.suggestions import suggestions
from sdvino.convert.work import Progress, silent
from sdvino.errors import Cancelled, RequestError, SdvinoError
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
    fresh: bool = False,
    progress: Progress = silent,
) -> ModelFolder:
    """Convert the diffusers folder ``source`` into the model folder ``folder``.

    recipe: fp16, int8-weights or int8 (see `sdvino.compress.recipes`); components: exceptions,
    component to precision. prompts: what int8 is calibrated on; None takes the source's
    calibration_prompts.txt, or a general list. suggested: num_inference_steps, guidance_scale,
    scheduler. name: the model's name in the manifest; None takes the source folder's.
    fresh: do not continue what an earlier, interrupted conversion to ``folder`` finished.
    progress: called with what is being done and the share done.

    The folder appears when it is complete. After Ctrl-C, a crash or a failure the finished steps
    stay in `.NAME.sdvino-partial` beside it, and the same call continues from them. The source is
    never changed, and nothing in it is run: its weights are read from safetensors.
    Raises RequestError (wrong source, recipe, prompts, or missing libraries), OutputError (a
    folder that cannot be written), SdvinoError (the libraries failed) and Cancelled (Ctrl-C).
    """
    request = make_request(
        source,
        recipe=recipe,
        components=components,
        prompts=prompts,
        suggested=suggested,
        name=name,
    )
    return run(request, Path(folder), overwrite=overwrite, fresh=fresh, progress=progress)


def make_request(
    source: Path | str,
    *,
    recipe: str = DEFAULT_RECIPE,
    components: Mapping[str, str] | None = None,
    prompts: Sequence[str] | None = None,
    suggested: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Request:
    """Return the arguments of `convert` as a Request; raises RequestError for absurd ones."""
    return Request(
        source=str(Path(source).absolute()),
        recipe=recipe,
        components={} if components is None else dict(components),
        prompts=None if prompts is None else check_prompts(prompts),
        suggested=None if suggested is None else dict(suggested),
        name=name,
    )


def run(
    request: Request, folder: Path, *, overwrite: bool, fresh: bool, progress: Progress
) -> ModelFolder:
    """Do the conversion that ``request`` describes; see `convert`."""
    recipe = request.resolve_recipe()
    target = folder.absolute()
    _check_apart(Path(request.source), target)
    work = WorkFolder(target)
    conversion = None
    try:
        source = request.open_source(work.path)
        plan, hints = _decide(request, recipe, source)
        conversion = Conversion(source, plan, hints, work, progress)
        if conversion.delivered:
            work.close(remove=True)
            return ModelFolder.open(target)
        check_target(target, overwrite=overwrite)
        require_libraries()
        if fresh:
            work.start_anew()
        check_needs(work_out(conversion.left(), conversion.plan), work.path)
        conversion.run()
        if not conversion.gated:
            apply_gate(conversion)
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


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a conversion would do, and what it would need."""

    source: DiffusersFolder
    recipe: Recipe
    #: What every step takes.
    steps: tuple[StepNeeds, ...]
    #: Names of the steps that an interrupted conversion has finished.
    finished: frozenset[str]
    #: What the other steps take together.
    needs: Needs


def look_ahead(
    request: Request, folder: Path, *, overwrite: bool = False, fresh: bool = False
) -> Outlook:
    """Tell what `run` would do, without doing it or writing anything.

    Raises what `run` would raise before its first step, but for a disk or memory too small.
    """
    recipe = request.resolve_recipe()
    target = folder.absolute()
    _check_apart(Path(request.source), target)
    check_target(target, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="sdvino-") as scratch:
        source = request.open_source(Path(scratch))
        plan, _ = _decide(request, recipe, source)
        steps = steps_of(source, plan, origin_of(source, plan))
        known = {} if fresh else recorded_steps(target)
        everything = work_out([step for step, _ in steps], plan)
    finished = frozenset(step.name for step, key in steps if known.get(step.name) == key)
    left = [step for step, _ in steps if step.name not in finished]
    return Outlook(source, recipe, everything.steps, finished, work_out(left, plan))


def _decide(
    request: Request, recipe: Recipe, source: DiffusersFolder
) -> tuple[WorkPlan, Mapping[str, Any]]:
    """Return what the worker processes are to do, and what the folder will suggest."""
    hints = suggestions(source, {} if request.suggested is None else request.suggested)
    calibration = _calibration(source, request.prompts, hints["guidance_scale"])
    plan = WorkPlan(
        request=request,
        recipe=recipe,
        calibration=calibration,
        components=tuple(source.components),
    )
    return plan, hints


def apply_gate(conversion: Conversion) -> None:
    """Compare the compressed model with the float one, and mend it until it is good enough.

    THE GATE'S HOOK. conversion.work.float and conversion.work.model are two model folders but for
    their manifests, conversion.plan.recipe says how the second was made, and
    conversion.recompress(recipe, components) compresses some components of it again. What the gate
    returns, as what JSON holds, is recorded with conversion.record_quality(value): it goes into
    sdvino.json, and a conversion killed later does not run the gate again.
    """


def _calibration(
    source: DiffusersFolder, prompts: Sequence[str] | None, guidance_scale: float
) -> CalibrationPlan:
    """Choose prompts and how many inputs are kept, by the size of the UNet."""
    own = source.path / PROMPTS_FILE
    if prompts is not None:
        texts = tuple(prompts)
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


def _check_apart(source: Path, target: Path) -> None:
    real = source.resolve()
    if target.resolve() == real or target.resolve() in real.parents:
        raise RequestError(f"{target} is, or holds, the source; choose another name.")


def _how_to_go_on(work: WorkFolder) -> str:
    return (
        f"the finished steps are kept in {work.path}: run the same command again to continue,"
        " or delete that folder"
    )
