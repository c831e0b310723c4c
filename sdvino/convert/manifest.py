"""sdvino.json: what a converted folder says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdvino.compress.recipes import Recipe
from sdvino.convert.staging import MANIFEST_NAME

_TOOLS = ("sdvino", "openvino", "nncf", "optimum-intel", "diffusers", "transformers", "torch")


def write_manifest(
    folder: Path,
    *,
    source: str,
    family: str,
    recipe: Recipe,
    suggested: Mapping[str, Any],
) -> None:
    """Write sdvino.json into the finished ``folder``: every sub-folder's files and their hashes.

    ``source`` is a name, never a path.
    """
    components = {}
    for part in sorted(folder.iterdir()):
        if not (part / "openvino_model.xml").is_file():
            continue
        files = sorted(file for file in part.rglob("*") if file.is_file())
        components[part.name] = {
            "precision": recipe.treatment(part.name),
            "bytes": sum(file.stat().st_size for file in files),
            "sha256": {file.relative_to(part).as_posix(): sha256(file) for file in files},
        }
    manifest = {
        "format_version": 1,
        "source": source,
        "family": family,
        "recipe": recipe.name,
        "components": components,
        "suggested": dict(suggested),
        "versions": tool_versions(),
    }
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions of the libraries that made the folder, without local build tags."""
    return {name: text for name in _TOOLS if (text := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
