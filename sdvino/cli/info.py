"""`sdvino info`: what a model is, or with which settings a picture was made."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.terminal import echo
from sdvino.errors import RequestError
from sdvino.inputs.files import user_path
from sdvino.inputs.shown import one_line

if TYPE_CHECKING:
    from sdvino.folder.index import ModelFolder


@click.command("info")
@click.argument("path", metavar="FOLDER|FILE|PICTURE|ID", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verify", is_flag=True, help="Compare every file with its SHA-256.")
def info_command(path: str | None, as_json: bool, verify: bool) -> None:
    """Show what a model folder says of itself, or the settings that a picture carries.

    Of a .safetensors checkpoint or a diffusers folder: what it is, and what -m would convert it to.
    Without an argument: the bundled demo model.
    """
    if path is not None and _is_checkpoint(user_path(path)):
        _show_checkpoint(user_path(path), as_json)
        return
    if path is not None and user_path(path).is_file():
        _show_picture(user_path(path), as_json)
        return
    from sdvino.folder.hub import resolve_model
    from sdvino.folder.index import ModelFolder

    if path is not None and Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        raise RequestError(f"There is no picture {path}.")
    folder = ModelFolder.open(resolve_model(path, offline=True))
    facts = _facts(folder)
    if verify:
        found = folder.verify()
        size = f"{found.bytes / 1e6:,.1f} MB"
        facts["verified"] = f"{found.files} files ({size}) are as sdvino.json lists them"
        facts["not listed there"] = ", ".join(found.unlisted) if found.unlisted else None
    if as_json:
        echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name == "components":
            for component, entry in value.items():
                size = f"{entry['bytes'] / 1e6:,.1f} MB"
                echo(f"  {component:14} {size:>12}  {one_line(entry['precision'])}")
        elif name == "quality" and value is not None:
            from sdvino.compress.verdict import quality_line

            echo(f"quality: {quality_line(value)}")
        elif value is not None:
            echo(f"{name}: {one_line(value)}")


def _is_checkpoint(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() == ".safetensors"
    from sdvino.first_use.resolve import needs_conversion

    return needs_conversion(path)


def _show_checkpoint(path: Path, as_json: bool) -> None:
    from sdvino.convert.api import look_ahead, make_request
    from sdvino.first_use.resolve import default_recipe

    with tempfile.TemporaryDirectory(prefix="sdvino-") as scratch:
        outlook = look_ahead(make_request(path, recipe=default_recipe()), Path(scratch) / "model")
    source = outlook.source
    facts = {
        "name": source.name,
        "family": source.family.name,
        "prediction": source.prediction_type,
        "converted to": outlook.recipe.name,
        "seconds": round(outlook.needs.seconds),
    }
    if as_json:
        echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        echo(f"{name}: {one_line(value)}")
    echo(f'Try it: sdvino generate -m {path} "a prompt"')


def _show_picture(path: Path, as_json: bool) -> None:
    from sdvino.image.parameters import to_text
    from sdvino.image.picture import read_record

    record = read_record(path)
    echo(json.dumps(record.to_plain(), indent=2) if as_json else to_text(record))


def _facts(folder: ModelFolder) -> dict[str, Any]:
    manifest = folder.manifest
    recorded = {} if manifest is None else manifest.components
    suggested = folder.suggested
    return {
        "name": folder.name,
        "family": None if manifest is None else manifest.family,
        "recipe": None if manifest is None else manifest.recipe,
        "baked in": None if manifest is None or not manifest.baked else dict(manifest.baked),
        "made for": None if manifest is None else manifest.target,
        "size": f"{folder.width} x {folder.height}",
        "prediction": folder.prediction_type,
        "scheduler": folder.scheduler_config.get("_class_name"),
        "suggested steps": suggested.num_inference_steps,
        "suggested guidance": suggested.guidance_scale,
        "suggested scheduler": suggested.scheduler,
        "bytes": sum(component.bytes for component in folder.components.values()),
        "components": {
            name: {
                "bytes": component.bytes,
                "precision": recorded[name].precision if name in recorded else "as exported",
            }
            for name, component in folder.components.items()
        },
        "quality": None if manifest is None else manifest.quality,
    }
