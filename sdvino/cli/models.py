"""`sdvino models`: which models are here, and removing those that were converted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.terminal import echo
from sdvino.errors import RequestError
from sdvino.inputs.shown import one_line, shown_size

if TYPE_CHECKING:
    from sdvino.first_use.models import Model


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes, times in UTC, paths.")
@click.option(
    "--remove",
    "names",
    multiple=True,
    metavar="NAME",
    help="Remove a converted model, or what is left of an interrupted conversion; may be repeated.",
)
def models_command(as_json: bool, names: Sequence[str]) -> None:
    """List the models on this machine, or remove converted ones.

    \b
    sdvino models
    sdvino models --remove dreamshaper_8-int8

    bundled: comes with sdvino. converted: a checkpoint given to -m, as it was kept. interrupted:
    what a stopped conversion has finished; the same -m goes on from there. downloaded: in the
    cache of the Hugging Face hub, which `hf cache` manages.
    """
    from sdvino.first_use.models import list_models, remove_models
    from sdvino.first_use.store import ConvertedModels

    store = ConvertedModels()
    if names:
        if as_json:
            raise RequestError("--json is for the list; leave it out beside --remove.")
        for name, size in remove_models(store, names):
            echo(f"removed {name}: {shown_size(size)} freed")
        return
    models = list_models(store)
    kept = sum(model.bytes for model in models if model.kind in ("converted", "interrupted"))
    if as_json:
        value = {
            "folder": str(store.root),
            "bytes": kept,
            "limit_bytes": store.limit,
            "models": [_plain(model) for model in models],
        }
        echo(json.dumps(value, indent=2))
        return
    echo(_table(models))
    echo(f"converted: {shown_size(kept)} of at most {shown_size(store.limit)}, in {store.root}")


def _plain(model: Model) -> dict[str, Any]:
    used = model.used
    return {
        "name": model.name,
        "kind": model.kind,
        "family": model.family,
        "recipe": model.recipe,
        "compared": model.compared,
        "bytes": model.bytes,
        "last_used": None
        if used is None
        else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(used)),
        "path": str(model.path),
    }


def _table(models: Sequence[Model]) -> str:
    rows = [("name", "", "family", "recipe", "size", "last used"), *map(_row, models)]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    # Sizes to the right, the rest to the left.
    return "\n".join(
        "  ".join(
            text.rjust(width) if column == 4 else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(model: Model) -> tuple[str, ...]:
    recipe = "-" if model.recipe is None else one_line(model.recipe)
    if model.kind == "converted" and model.compared is False and recipe != "fp16":
        recipe += ", not compared"
    used = model.used
    return (
        one_line(model.name),
        model.kind,
        "-" if model.family is None else one_line(model.family),
        recipe,
        shown_size(model.bytes),
        "-" if used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(used)),
    )
