"""`sdvino convert`: a diffusers folder in, an OpenVINO model folder out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sdvino.convert.api import Outlook


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
@click.option("--name", help="Name of the model in its manifest.  [default: SOURCE's]")
@click.option("--overwrite", is_flag=True, help="Replace FOLDER if sdvino convert made it.")
@click.option(
    "--fresh", is_flag=True, help="Begin anew, whatever an interrupted conversion has finished."
)
@click.option(
    "--dry-run", is_flag=True, help="Show the steps, memory, disk and time it would take; no more."
)
def convert_command(
    source: Path,
    folder: Path,
    recipe: str,
    overrides: Sequence[str],
    prompts_file: Path | None,
    suggest: str | None,
    name: str | None,
    overwrite: bool,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Convert SOURCE, a diffusers folder of Stable Diffusion 1.x or 2.x, into FOLDER.

    Needs the convert extra: pip install "sdvino[convert]". A safety checker is not converted.
    Interrupted, it continues from the finished steps when it is run again.
    """
    from sdvino.compress.prompts import read_prompts
    from sdvino.convert.api import look_ahead, make_request, run
    from sdvino.convert.suggestions import parse_suggestions

    prompts = None if prompts_file is None else read_prompts(prompts_file)
    suggested = None if suggest is None else parse_suggestions(suggest)
    request = make_request(
        source,
        recipe=recipe,
        components=_pairs(overrides),
        prompts=prompts,
        suggested=suggested,
        name=name,
    )
    if dry_run:
        click.echo(preview(look_ahead(request, folder, overwrite=overwrite, fresh=fresh), folder))
        return
    with _bar() as show:
        result = run(request, folder, overwrite=overwrite, fresh=fresh, progress=show)
    click.echo(summary(result.path))


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """Show a bar with the step, the share done and the time left, on a terminal."""
    from tqdm import tqdm

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
        yield show


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
            lines.append(
                f"{row}{f'{step.memory / 1e9:.1f} GB':>10}{size:>10}{_minutes(step.seconds):>10}"
            )
    standing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    total = memory_status().total
    machine = "" if total is None else f" of {total / 1e9:.1f} GB"
    lines += [
        f"memory: {needs.memory / 1e9:.1f} GB at most{machine}, one step at a time",
        f"disk:   {needs.disk / 1e9:.1f} GB meanwhile, {shutil.disk_usage(standing).free / 1e9:.1f}"
        " GB free",
        f"time:   about {_minutes(needs.seconds)} on a small laptop",
    ]
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


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
