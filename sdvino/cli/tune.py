"""`sdvino tune`: measure on this machine how a model runs fastest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.options import model_folder, model_options, plugin_option, request_options
from sdvino.cli.terminal import USER_PATH, echo
from sdvino.errors import Cancelled, RequestError, SdvinoError

if TYPE_CHECKING:
    from sdvino.folder.index import ModelFolder
    from sdvino.tuning.axes import Choice
    from sdvino.tuning.search import Trial
    from sdvino.tuning.tune import Tuning

MAX_MINUTES = 24 * 60


@click.command("tune")
@model_options
@click.option(
    "--minutes", type=float, default=5.0, show_default=True, help="Time to measure, about."
)
@request_options("width", "height", help="Of the pictures to tune for.  [default: the model's]")
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="Measure how guidance runs too.  [default: if the model is used with it]",
)
@click.option(
    "--device", "devices", multiple=True, help="Measure on this device; repeat.  [default: all]"
)
@click.option("--plot", type=USER_PATH, help="Draw what was tried into this picture.")
@plugin_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def tune_command(
    minutes: float,
    width: int | None,
    height: int | None,
    guidance: bool | None,
    devices: tuple[str, ...],
    plot: Path | None,
    quiet: bool,
    **model: Any,
) -> None:
    """Measure how a model runs fastest here, and keep it for `sdvino generate`.

    \b
    sdvino tune -m FOLDER --minutes 10 --plot tried.png

    Ctrl-C ends it with the best found so far.
    """
    if not 0.0 < minutes <= MAX_MINUTES:
        raise RequestError(f"--minutes is {minutes:g}; give a number from above 0 to a day's 1440.")
    from sdvino.folder.index import ModelFolder
    from sdvino.image.picture import check_output
    from sdvino.tuning.tune import tune

    if plot is not None:
        check_output(plot)
    folder = ModelFolder.open(model_folder(**model, quiet=quiet))
    found = tune(
        folder,
        seconds=minutes * 60.0,
        width=width,
        height=height,
        devices=devices,
        guided=_uses_guidance(folder) if guidance is None else guidance,
        report=_silent if quiet else _show,
    )
    if not found.components:
        if found.interrupted:
            raise Cancelled("Cancelled before anything was measured; no profile was written.")
        problems = [trial.problem for tried in found.trials.values() for trial in tried]
        reason = next((problem for problem in problems if problem is not None), None)
        raise SdvinoError(
            "Nothing could be measured in that time; give more --minutes."
            if reason is None
            else f"Nothing could be measured: {reason}"
        )
    _keep(folder, found, width, height)
    _print(found)
    if plot is not None:
        from sdvino.image.picture import save_picture
        from sdvino.tuning.chart import draw_trials

        title = f"sdvino tune: {folder.name}, {time.strftime('%Y-%m-%d')}"
        echo(f"plot: {save_picture(draw_trials(found.trials, title), plot)}")


def _uses_guidance(folder: ModelFolder) -> bool:
    suggested = folder.suggested.guidance_scale
    scale = folder.kind.guidance_scale if suggested is None else suggested
    return scale > 1.0 and folder.guidance_width is None


def _keep(folder: ModelFolder, found: Tuning, width: int | None, height: int | None) -> None:
    """Write the profile, with what earlier runs learnt and, where this one ended early, found."""
    from dataclasses import replace

    from sdvino.runtime.profile import ProfileStore, profile_key
    from sdvino.tuning.tune import still_valid

    store = ProfileStore()
    before = store.read(profile_key(folder), folder.name)
    profile = replace(
        before,
        name=folder.name,
        tuned=time.strftime("%Y-%m-%d"),
        width=folder.width if width is None else width,
        height=folder.height if height is None else height,
        components={**before.components, **found.components},
        fallbacks=still_valid(before.fallbacks, found.trials),
        guidance_mode=before.guidance_mode if found.guidance_mode is None else found.guidance_mode,
    )
    if not store.write(profile):
        raise SdvinoError(
            f"The profile could not be written to {store.folder}; free some space,"
            " or set SDVINO_CACHE_DIR to a folder that you may write to."
        )


def _show(component: str, trial: Trial[Choice], left: float) -> None:
    minutes, seconds = divmod(max(0, round(left)), 60)
    what = trial.problem if trial.problem is not None else f"{trial.best:.3f} s"
    echo(
        f"{component}, {trial.axis}: {trial.candidate.label}: {what}"
        f"  ({minutes}:{seconds:02} left)",
        err=True,
    )


def _silent(component: str, trial: Trial[Choice], left: float) -> None:
    return


def _print(found: Tuning) -> None:
    if found.interrupted:
        echo("Stopped; what was best so far is kept.", err=True)
    elif not found.complete:
        echo("The time is up; what was best so far is kept.", err=True)
    for name, tuned in found.components.items():
        words = ", ".join(
            f"{key.removeprefix('num_').replace('_', ' ')} {value}"
            for key, value in tuned.settings.items()
        )
        gain = tuned.default_seconds / tuned.seconds if tuned.seconds > 0 else 1.0
        echo(f"{name}: {tuned.seconds:.3f} s, {gain:.2f} x the defaults' speed: {words}")
    if found.guidance_mode is not None:
        echo(f"guidance: {found.guidance_mode}")
