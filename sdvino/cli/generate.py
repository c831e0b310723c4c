"""`sdvino generate`: pictures from prompts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.options import device_options, model_options
from sdvino.generation import GenerationRequest
from sdvino.settings import (
    NOISES,
    SAMPLERS,
    SIGMA_SCHEDULES,
    TIMESTEP_SPACINGS,
)

if TYPE_CHECKING:
    pass

MAX_PROMPTS_FILE = 2**22
DEFAULTS = {f.name: f.default for f in fields(GenerationRequest)}


@click.command("generate")
@click.argument("prompt", required=False)
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, spelled as an option."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A file with a prompt on each line; the model is loaded once.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What should not be in the picture.")
@model_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
    help="Repeat a picture with the settings it carries; other options change them.",
)
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="Write the picture so far here after each step.",
)
@click.option("--no-metadata", is_flag=True, help="Do not write the settings into the picture.")
@click.option("--timings", is_flag=True, help="Say how long each part took.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@device_options
def generate_command(
    prompt: str | None,
    prompt_option: str | None,
    prompts: Path | None,
    negative_prompt: str | None,
    model: str | None,
    revision: str | None,
    offline: bool,
    output: Path,
    overwrite: bool,
    like: Path | None,
    preview: Path | None,
    no_metadata: bool,
    timings: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make pictures from PROMPT.

    \b
    sdvino generate "a red circle on a blue background" -o circle.png
    sdvino generate "a lighthouse at dusk" -m FOLDER -n 4 --steps 20 --seed 7
    """
