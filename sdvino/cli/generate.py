"""`sdvino generate`: pictures from prompts."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.options import (
    DEVICE_OPTIONS,
    MODEL_OPTIONS,
    SPEED_OPTIONS,
    device_options,
    memory_options,
    model_folder,
    model_options,
    request_options,
    run_settings,
    speed_options,
    taken,
)
from sdvino.cli.terminal import USER_PATH, echo
from sdvino.errors import Cancelled, RequestError
from sdvino.inputs.files import read_prompts
from sdvino.inputs.shown import shortened
from sdvino.request import OPTIONS, PictureRecord, Request, ResolvedRequest
from sdvino.settings import FAST

if TYPE_CHECKING:
    from sdvino.outputs import PictureEvent, StepEvent
    from sdvino.pipeline import StableDiffusionPipeline

_REQUEST_OPTIONS = [name for name in OPTIONS if name not in SPEED_OPTIONS]


@click.command("generate")
@click.argument("prompt", required=False)
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, spelled as an option."
)
@click.option(
    "--prompts",
    type=USER_PATH,
    help="A file with a prompt on each line; the model is loaded once.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What should not be in the picture.")
@model_options
@click.option(
    "-o",
    "--output",
    type=USER_PATH,
    default=Path("picture.png"),
    show_default=True,
    help="PNG, JPEG or WebP; %03d in the name becomes a number.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing picture instead of adding a number."
)
@request_options(*_REQUEST_OPTIONS)
@click.option(
    "--like",
    type=USER_PATH,
    help="Repeat a picture with the settings it carries; other options change them.",
)
@click.option(
    "--preview",
    type=USER_PATH,
    help="Write the picture so far here after each step.",
)
@click.option(
    "--vae-tiling/--no-vae-tiling",
    default=None,
    help="Decode in tiles, which takes less memory.  [default: when needed]",
)
@click.option(
    "--no-profile", is_flag=True, help="Do not use what `sdvino tune` and earlier runs found out."
)
@click.option("--no-metadata", is_flag=True, help="Do not write the settings into the picture.")
@click.option("--timings", is_flag=True, help="Say how long each part took, and the peak memory.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@speed_options
@memory_options
@device_options
def generate_command(
    output: Path,
    overwrite: bool,
    like: Path | None,
    preview: Path | None,
    vae_tiling: bool | None,
    no_profile: bool,
    no_metadata: bool,
    timings: bool,
    quiet: bool,
    max_memory: int | None,
    low_memory: bool,
    **options: Any,
) -> None:
    """Make pictures from PROMPT.

    \b
    sdvino generate "a red circle on a blue background" -o circle.png
    sdvino generate "a lighthouse at dusk" -m checkpoint.safetensors
    sdvino generate "a lighthouse at dusk" -m FOLDER -n 4 --steps 20 --seed 7
    """
    from sdvino.image.picture import check_output, read_record

    settings = run_settings(**taken(options, DEVICE_OPTIONS))
    model = taken(options, MODEL_OPTIONS)
    record = None if like is None else read_record(like)
    request = _request(options, record)
    check_output(output)
    if preview is not None:
        check_output(preview)

    from sdvino.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model_folder(**model, quiet=quiet),
        settings=replace(settings, max_memory=max_memory, low_memory=low_memory),
        vae_tiling=vae_tiling,
        profile=not no_profile,
    )
    if record is not None:
        _say_unlike(f"{like}", record, pipe.folder.name)
    sink = _Sink(output, overwrite, preview, not no_metadata, quiet)
    sink.run(pipe, request.resolve(pipe.folder))
    if timings:
        from sdvino.runtime.memory import peak_memory
        from sdvino.tuning.bench import breakdown

        echo(breakdown(sink.timings, pictures=sink.pictures, peak=peak_memory()), err=True)


def _request(options: dict[str, Any], like: PictureRecord | None) -> Request:
    """Return what is asked for: as the command line says, else as in the picture ``like``."""
    prompt, option = options.pop("prompt"), options.pop("prompt_option")
    texts = _prompts(prompt, option, options.pop("prompts"), like)
    fast, negative = options.pop("fast"), options.pop("negative_prompt")
    base = {} if like is None else like.request.flat()
    if negative is not None:
        base["negative_prompts"] = (negative if negative else None,)
    given = {name: value for name, value in options.items() if value is not None}
    return Request.of(**{**base, **(asdict(FAST) if fast else {}), **given, "prompts": texts})


def _prompts(
    prompt: str | None, option: str | None, file: Path | None, like: PictureRecord | None
) -> tuple[str, ...]:
    given = [value for value in (prompt, option, file) if value is not None]
    if len(given) > 1:
        raise RequestError("The prompt is given more than once; give PROMPT, -p or --prompts.")
    if file is not None:
        return read_prompts(file)
    if given:
        return (str(given[0]),)
    if like is not None:
        return like.request.prompts
    raise RequestError('There is no prompt; write one: sdvino generate "a red circle".')


#: Of a name in somebody's picture, on the terminal.
_LONGEST_NAME = 100


def _say_unlike(picture: str, record: PictureRecord, model: str) -> None:
    """Say in what a picture made like another will differ from it."""
    if record.model is not None and record.model != model:
        other = shortened(record.model, _LONGEST_NAME)
        echo(f"{picture} was made with the model {other}, this is {model}.", err=True)
    sampler = dict(record.other).get("Sampler")
    if record.request.sampler.scheduler is None and sampler is not None:
        other = shortened(sampler, _LONGEST_NAME)
        echo(
            f"{picture} was made with {other}, which sdvino does not have; the model's own"
            " scheduler is used.",
            err=True,
        )


class _Sink:
    """Shows the progress of a request and saves its pictures as they are finished."""

    def __init__(
        self, output: Path, overwrite: bool, preview: Path | None, metadata: bool, quiet: bool
    ) -> None:
        from sdvino.runtime.timings import Timings

        self.timings = Timings()
        #: How many pictures were saved.
        self.pictures = 0
        self._output = output
        self._overwrite = overwrite
        self._preview = preview
        self._metadata = metadata
        self._quiet = quiet

    def run(self, pipe: StableDiffusionPipeline, request: ResolvedRequest) -> None:
        """Make every picture of ``request``; a Ctrl-C leaves the finished ones."""
        from tqdm import tqdm

        from sdvino.outputs import StepEvent

        self._say_dropped(pipe, request)
        steps = pipe.schedule(request).steps * len(request.jobs)
        # disable=None: no bar where stderr is not a terminal.
        with tqdm(total=steps, unit="step", disable=True if self._quiet else None) as bar:
            try:
                for event in pipe.stream(request, timings=self.timings, once=True):
                    if isinstance(event, StepEvent):
                        bar.update()
                        self._show(pipe, event)
                        continue
                    path = self._save(pipe, request, event)
                    self.pictures += 1
                    bar.write(f"{path}")
                    if not self._quiet:
                        bar.write(f"  seed {event.job.seed}", file=sys.stderr)
            except KeyboardInterrupt:
                raise Cancelled(
                    f"Cancelled; {self.pictures} of {len(request.jobs)} pictures were finished,"
                    " and nothing was left half-written."
                ) from None

    def _say_dropped(self, pipe: StableDiffusionPipeline, request: ResolvedRequest) -> None:
        for text in dict.fromkeys(job.prompt for job in request.jobs):
            dropped = pipe.dropped_words(text)
            if dropped:
                echo(
                    f"The text encoder reads {pipe.folder.text_length} tokens;"
                    f" these words are left out: {shortened(dropped)}",
                    err=True,
                )

    def _show(self, pipe: StableDiffusionPipeline, event: StepEvent) -> None:
        if self._preview is not None:
            from sdvino.image.picture import save_picture

            save_picture(pipe.preview(event.denoised), self._preview, overwrite=True)

    def _save(
        self, pipe: StableDiffusionPipeline, request: ResolvedRequest, event: PictureEvent
    ) -> Path:
        from sdvino.image.picture import save_picture

        assert event.pixels is not None  # the stream was asked for pictures
        return save_picture(
            event.pixels,
            self._output,
            pipe.record(request, event.job) if self._metadata else None,
            # The pictures of one run must not replace each other.
            overwrite=self._overwrite and event.job.index == 0,
        )
