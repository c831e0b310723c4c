"""`sdvino convert`: a diffusers folder in, an OpenVINO model folder out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    metavar="fp16|int8-weights|int8",
    help="How small and fast: half precision; 8-bit weights; 8-bit weights and activations.",
)
@click.option(
    "--component",
    "overrides",
    multiple=True,
    metavar="NAME=PRECISION",
    help="Treat one component otherwise, such as vae_decoder=fp16; may be repeated.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts to calibrate int8 on, one a line.  [default: the source's"
    " calibration_prompts.txt, or a general list]",
)
@click.option(
    "--suggest",
    metavar="steps=20,guidance=7.5,scheduler=NAME",
    help="What the folder suggests for a good first picture.",
)
@click.option(
    "--min-psnr",
    type=float,
    metavar="DB",
    help="Least median PSNR of pictures to the uncompressed model's.  [default: by recipe; int8 30,"
    " int8-weights 40]",
)
@click.option(
    "--gate-minutes",
    type=float,
    default=30.0,
    show_default=True,
    metavar="MIN",
    help="What comparing with the uncompressed model, and mending, may take.",
)
@click.option("--no-gate", is_flag=True, help="Do not compare with the uncompressed model.")
@click.option("--name", help="Name of the model in its manifest.  [default: SOURCE's]")
@click.option("--overwrite", is_flag=True, help="Replace FOLDER if sdvino convert made it.")
def convert_command(
    source: Path,
    folder: Path,
    recipe: str,
    overrides: Sequence[str],
    prompts_file: Path | None,
    suggest: str | None,
    min_psnr: float | None,
    gate_minutes: float,
    no_gate: bool,
    name: str | None,
    overwrite: bool,
) -> None:
    """Convert SOURCE, a diffusers folder of Stable Diffusion 1.x or 2.x, into FOLDER.

    Needs the convert extra: pip install "sdvino[convert]". A safety checker is not converted.
    """
    from tqdm import tqdm

    from sdvino.compress.prompts import read_prompts
    from sdvino.convert.api import convert
    from sdvino.convert.gating import GateSettings
    from sdvino.convert.suggestions import parse_suggestions

    prompts = None if prompts_file is None else read_prompts(prompts_file)
    suggested = None if suggest is None else parse_suggestions(suggest)
    components = _pairs(overrides)
    gate = None if no_gate else GateSettings(min_psnr=min_psnr, minutes=gate_minutes)
    bar = tqdm(
        total=1.0,
        bar_format="{desc:24}{percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
        file=sys.stderr,
        disable=None,
        leave=False,
    )

    def show(what: str, share: float) -> None:
        bar.set_description_str(what, refresh=False)
        bar.update(max(0.0, share - bar.n))

    with bar:
        result = convert(
            source,
            folder,
            recipe=recipe,
            components=components,
            prompts=prompts,
            suggested=suggested,
            name=name,
            overwrite=overwrite,
            gate=gate,
            progress=show,
            say=lambda line: tqdm.write(f"sdvino: {line}", file=sys.stderr),
        )
    click.echo(summary(result.path))


def summary(folder: Path) -> str:
    """Return the lines that `sdvino convert` ends with: each component's precision and size."""
    from sdvino.model_folder import ModelFolder

    model = ModelFolder.open(folder)
    lines = [f"{model.path}"]
    total = 0
    for name, files in model.components.items():
        precision = "" if model.manifest is None else model.manifest.components[name].precision
        total += files.bytes
        lines.append(f"  {name:16}{precision:14}{files.bytes / 1e6:10.1f} MB")
    lines.append(f"  {'together':30}{total / 1e6:10.1f} MB")
    if model.manifest is not None and model.manifest.quality is not None:
        from sdvino.compress.verdict import quality_line

        lines.append(f"  quality: {quality_line(model.manifest.quality)}")
    lines.append(f'Try it: sdvino generate -m {folder} "a prompt"')
    return "\n".join(lines)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    from sdvino.errors import RequestError

    pairs: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or name in pairs:
            raise RequestError(
                f"--component {word} is not understood; write NAME=PRECISION, each NAME once."
            )
        pairs[name] = value
    return pairs
