"""`sdvino convert`: whatever people have in, an OpenVINO model folder out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.options import download_option
from sdvino.cli.terminal import USER_PATH, echo
from sdvino.inputs.shown import shown_seconds, shown_size

if TYPE_CHECKING:
    from sdvino.convert.api import Outlook


@click.command("convert")
@click.argument("source")
@click.argument("folder", type=USER_PATH)
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    metavar="fp16|int8-weights|int8-hybrid|int8|int4-weights|global|local|FILE.toml",
    help="How small and fast: half precision; 8-bit weights; the same with 8-bit convolutions;"
    " 8-bit weights and activations; 4-bit weights; one 8-bit scheme for everything; each layer"
    " of the UNet as it bears it, under a budget of bytes; or a recipe of your own.",
)
@click.option(
    "--target",
    default="auto",
    show_default=True,
    metavar="auto|avx2|avx2-vnni|avx512-vnni|amx|gpu",
    help="The machine that int8 is made for; auto is this one's processor.",
)
@click.option(
    "--show-recipe",
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, name: _show_recipe(context, name),
    help="Print a recipe as TOML, to start one of your own from, and stop.",
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
    type=USER_PATH,
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
@click.option("--revision", help="Branch, tag or commit, where SOURCE is on the hub.")
@click.option(
    "--offline", is_flag=True, help="Take SOURCE from what was downloaded from the hub before."
)
@download_option
@click.option(
    "--tokenizer",
    type=USER_PATH,
    metavar="FOLDER",
    help="CLIP's vocabulary (vocab.json, merges.txt), where SOURCE is a single file."
    "  [default: the hub's cache, or open_clip_torch's]",
)
@click.option(
    "--prediction-type",
    metavar="epsilon|v_prediction",
    help="What the UNet predicts, where SOURCE is a single file that does not say.",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="Merge a LoRA (.safetensors) into the weights; may be repeated.  [default weight: 1]",
)
@click.option(
    "--vae",
    type=USER_PATH,
    metavar="FOLDER|FILE",
    help="Another autoencoder in the source's place.",
)
@click.option(
    "--tiny-vae",
    type=USER_PATH,
    metavar="FOLDER|FILE",
    help="A tiny autoencoder (TAESD) beside it, for previews and speed.",
)
@click.option(
    "--exporter",
    type=click.Choice(["sdvino", "optimum-intel"]),
    default="sdvino",
    show_default=True,
    help="Who writes the graphs; optimum-intel knows more networks and needs the train extra.",
)
@click.option("--overwrite", is_flag=True, help="Replace FOLDER if sdvino convert made it.")
@click.option(
    "--fresh", is_flag=True, help="Begin anew, whatever an interrupted conversion has finished."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the steps, memory, disk, download and time it would take; no more.",
)
def convert_command(
    source: str, folder: Path, overwrite: bool, fresh: bool, dry_run: bool, **options: Any
) -> None:
    """Convert SOURCE into FOLDER.

    SOURCE is a diffusers folder, a .safetensors checkpoint, an OpenVINO folder, or a model on the
    hub (owner/name, or owner/name/FILE.safetensors) of Stable Diffusion 1.x, 2.x or XL, or one made
    from them (turbo, LCM, Lightning, SSD-1B, small and inpainting models). Any recipe but fp16
    needs the convert extra: pip install "sdvino[convert]". A safety checker is not converted.
    Interrupted, it continues from the finished steps when it is run again.
    """
    from tqdm import tqdm

    from sdvino.compress.local_report import read_tables
    from sdvino.convert.api import look_ahead, make_request, run
    from sdvino.first_use.report import progress_bar

    request = make_request(source, download=not dry_run, **_arguments(options))
    if dry_run:
        echo(preview(look_ahead(request, folder, overwrite=overwrite, fresh=fresh), folder))
        return
    with progress_bar() as show:
        result = run(
            request,
            folder,
            overwrite=overwrite,
            fresh=fresh,
            progress=show,
            say=lambda line: tqdm.write(f"sdvino: {line}", file=sys.stderr),
        )
    for line in read_tables(result.path, result.components):
        echo(line, err=True)
    echo(summary(result.path))


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as arguments of `sdvino.convert.api.make_request`."""
    from sdvino.compress.thresholds import GateSettings
    from sdvino.convert.suggestions import parse_suggestions
    from sdvino.inputs.files import read_prompts

    prompts, suggest = options.pop("prompts_file"), options.pop("suggest")
    judged = {"min_psnr": options.pop("min_psnr"), "minutes": options.pop("gate_minutes")}
    gate = None if options.pop("no_gate") else GateSettings(**judged)
    components = _pairs(options.pop("overrides"))
    return {
        **options,
        "components": components,
        "prompts": None if prompts is None else read_prompts(prompts),
        "suggested": None if suggest is None else parse_suggestions(suggest),
        "gate": gate,
    }


def preview(outlook: Outlook, folder: Path) -> str:
    """Return the lines of `--dry-run`: each step with what it takes, and what there is."""
    import shutil

    from sdvino.runtime.memory import memory_status

    name, family, needs = outlook.source.name, outlook.source.family.name, outlook.needs
    lines = [
        f"{name} ({family}) would become {folder}, by the recipe {outlook.recipe.name}:",
        f"  {'step':24}{'what':24}{'memory':>10}{'disk':>10}{'time':>10}",
    ]
    for step in outlook.steps:
        row = f"  {step.step.name:24}{step.what:24}"
        if step.step.name in outlook.finished:
            lines.append(f"{row}{'finished already':>30}")
        else:
            size = f"{step.disk / 1e9:.2f} GB"
            memory, time = f"{step.memory / 1e9:.1f} GB", shown_seconds(step.seconds)
            lines.append(f"{row}{memory:>10}{size:>10}{time:>10}")
    standing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    total = memory_status().total
    machine = "" if total is None else f" of {total / 1e9:.1f} GB"
    if outlook.download:
        lines.append(f"download: {shown_size(outlook.download)} from the hub, first")
    lines += [
        f"memory: {needs.memory / 1e9:.1f} GB at most{machine}, one step at a time",
        f"disk:   {needs.disk / 1e9:.1f} GB meanwhile, {shutil.disk_usage(standing).free / 1e9:.1f}"
        " GB free",
        f"time:   about {shown_seconds(needs.seconds)} on a small laptop",
    ]
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """Return the lines that `sdvino convert` ends with: each component's precision and size."""
    from sdvino.folder.index import ModelFolder

    model = ModelFolder.open(folder)
    lines = [f"{model.path}"]
    total = 0
    for name, files in model.components.items():
        precision = "" if model.manifest is None else model.manifest.components[name].precision
        total += files.bytes
        lines.append(f"  {name:16}{precision:14}{files.bytes / 1e6:10.1f} MB")
    lines.append(f"  {'together':30}{total / 1e6:10.1f} MB")
    if model.manifest is not None and model.manifest.passes:
        from sdvino.convert.metadata import notes, passes_lines

        passes = model.manifest.passes
        lines += [f"  {line}" for line in [*passes_lines(passes), *notes(passes)]]
    if model.manifest is not None and model.manifest.quality is not None:
        from sdvino.compress.verdict import quality_line

        lines.append(f"  quality: {quality_line(model.manifest.quality)}")
    if model.manifest is not None and model.manifest.target is not None:
        lines.append(f"  made for: {model.manifest.target}")
    lines.append(f'Try it: sdvino generate -m {folder} "a prompt"')
    return "\n".join(lines)


def _show_recipe(context: click.Context, name: str | None) -> None:
    """Print the recipe and stop, before SOURCE and FOLDER are asked for."""
    if name is None or context.resilient_parsing:
        return
    from sdvino.compress.recipe_file import to_toml
    from sdvino.compress.recipes import get_recipe

    echo(to_toml(get_recipe(name)), nl=False)
    context.exit()


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
