"""`sdvino generate`: pictures from prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.options import (
    DEVICE_OPTIONS,
    MODEL_OPTIONS,
    device_options,
    model_folder,
    model_options,
    run_settings,
)
from sdvino.cli.speed_options import (
    SPEED_OPTIONS,
    memory_options,
    speed_options,
    speed_settings,
    with_memory,
)
from sdvino.cli.terminal import USER_PATH, echo
from sdvino.errors import Cancelled, RequestError
from sdvino.inputs.files import read_prompts
from sdvino.inputs.shown import shortened
from sdvino.request import GenerationRequest, ResolvedRequest
from sdvino.settings import (
    NOISES,
    SAMPLERS,
    SIGMA_SCHEDULES,
    TIMESTEP_SPACINGS,
    SamplerSettings,
    SpeedSettings,
)

if TYPE_CHECKING:
    from sdvino.image.parameters import PictureSettings
    from sdvino.outputs import PictureEvent, StepEvent
    from sdvino.pipeline import StableDiffusionPipeline

_SAMPLER_OPTIONS = ("scheduler", "sigma_schedule", "timestep_spacing", "eta")
_REQUEST_OPTIONS = (
    "num_images_per_prompt",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "seed",
    "width",
    "height",
    "clip_skip",
    "noise",
)


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
@click.option(
    "-n", "num_images_per_prompt", type=int, help="Pictures of each prompt.  [default: 1]"
)
@click.option(
    "--steps", "num_inference_steps", type=int, help="Denoising steps.  [default: the model's]"
)
@click.option(
    "--guidance-scale",
    "--cfg-scale",
    type=float,
    help="How closely to follow the prompt; 1 is twice as fast.  [default: the model's]",
)
@click.option("--guidance-rescale", type=float, help="Against overexposure, 0 to 1.  [default: 0]")
@click.option(
    "-s", "--seed", type=int, help="The same seed gives the same picture.  [default: a new one]"
)
@click.option("-W", "--width", type=int, help="Pixels, a multiple of 8.  [default: the model's]")
@click.option("-H", "--height", type=int, help="Pixels, a multiple of 8.  [default: the model's]")
@click.option(
    "--scheduler", "--sampler", type=click.Choice(SAMPLERS), help="Sampler.  [default: the model's]"
)
@click.option(
    "--sigma-schedule", type=click.Choice(SIGMA_SCHEDULES), help="Spacing of the noise levels."
)
@click.option("--timestep-spacing", type=click.Choice(TIMESTEP_SPACINGS), help="Which timesteps.")
@click.option(
    "--eta",
    type=float,
    help="Fresh noise in each step, 0 to 1 (ddim, tcd).  [default: the sampler's]",
)
@click.option("--clip-skip", type=int, help="Leave out the last layers of the text encoder.")
@click.option(
    "--noise",
    type=click.Choice(NOISES),
    help="Random numbers as torch makes them on the CPU, or CUDA's.  [default: torch]",
)
@click.option(
    "--like",
    "like_picture",
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
    prompt: str | None,
    prompt_option: str | None,
    prompts: Path | None,
    output: Path,
    overwrite: bool,
    like_picture: Path | None,
    preview: Path | None,
    no_profile: bool,
    no_metadata: bool,
    timings: bool,
    quiet: bool,
    fast: bool,
    max_memory: str | None,
    low_memory: bool,
    **options: Any,
) -> None:
    """Make pictures from PROMPT.

    \b
    sdvino generate "a red circle on a blue background" -o circle.png
    sdvino generate "a lighthouse at dusk" -m checkpoint.safetensors
    sdvino generate "a lighthouse at dusk" -m FOLDER -n 4 --steps 20 --seed 7
    """
    from sdvino.image.picture import check_output

    device = {name: options.pop(name) for name in DEVICE_OPTIONS}
    model = {name: options.pop(name) for name in MODEL_OPTIONS}
    tiling = options.pop("vae_tiling")
    speed = {name: options.pop(name) for name in SPEED_OPTIONS}
    like = None if like_picture is None else _read_like(like_picture)
    texts = _prompts(prompt, prompt_option, prompts, like)
    request = _request(
        texts, options, like, speed_settings(fast, speed, None if like is None else like.speed)
    )
    check_output(output)
    if preview is not None:
        check_output(preview)
    settings = with_memory(run_settings(**device), max_memory, low_memory)

    from sdvino.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model_folder(**model, quiet=quiet),
        settings=settings,
        vae_tiling=tiling,
        profile=not no_profile,
    )
    if like is not None and like.model not in (None, pipe.folder.name):
        echo(
            f"{like_picture} was made with the model {like.model}, this is {pipe.folder.name}.",
            err=True,
        )
    if like is not None and like.scheduler is None and "Sampler" in dict(like.other):
        echo(
            f"{like_picture} was made with {dict(like.other)['Sampler']}, which sdvino does not"
            " have; the model's own scheduler is used.",
            err=True,
        )
    sink = _Sink(output, overwrite, preview, not no_metadata, quiet)
    sink.run(pipe, request.resolve(pipe.folder))
    if timings:
        from sdvino.runtime.memory import peak_memory
        from sdvino.tuning.bench import breakdown

        echo(breakdown(sink.timings, pictures=sink.pictures, peak=peak_memory()), err=True)


class _Sink:
    """Shows the progress of a request and saves its pictures as they are finished."""

    def __init__(
        self, output: Path, overwrite: bool, preview: Path | None, metadata: bool, quiet: bool
    ) -> None:
        from sdvino.outputs import Timings

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
            pipe.picture_settings(request, event.job) if self._metadata else None,
            # The pictures of one run must not replace each other.
            overwrite=self._overwrite and event.job.index == 0,
        )


def _prompts(
    prompt: str | None, option: str | None, file: Path | None, like: PictureSettings | None
) -> tuple[str, ...]:
    given = [value for value in (prompt, option, file) if value is not None]
    if len(given) > 1:
        raise RequestError("The prompt is given more than once; give PROMPT, -p or --prompts.")
    if file is not None:
        return read_prompts(file)
    if given:
        return (str(given[0]),)
    if like is not None:
        return (like.prompt,)
    raise RequestError('There is no prompt; write one: sdvino generate "a red circle".')


def _read_like(picture: Path) -> PictureSettings:
    from sdvino.image.picture import read_picture_settings

    return read_picture_settings(picture)


def _request(
    texts: tuple[str, ...],
    options: dict[str, Any],
    like: PictureSettings | None,
    speed: SpeedSettings,
) -> GenerationRequest:
    """Fill what the command line leaves open from ``like``; what both leave open is a default."""

    def filled(names: tuple[str, ...]) -> dict[str, Any]:
        values = {
            name: options[name]
            if options[name] is not None or like is None
            else getattr(like, name, None)
            for name in names
        }
        return {name: value for name, value in values.items() if value is not None}

    # A picture's text cannot tell an empty negative prompt from none, so both are none here.
    negative = filled(("negative_prompt",)).get("negative_prompt") or None
    return GenerationRequest(
        prompts=texts,
        negative_prompts=(negative,),
        sampler=SamplerSettings(**filled(_SAMPLER_OPTIONS)),
        speed=speed,
        **filled(_REQUEST_OPTIONS),
    )
