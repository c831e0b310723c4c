"""sdvino.json: what a converted folder says about itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdvino import __version__
from sdvino.compress.passes_report import PASSES_FILE, passes_report
from sdvino.compress.recipes import Recipe
from sdvino.folder.manifest import (
    MANIFEST_FILE,
    Accelerated,
    Manifest,
    ManifestComponent,
    Suggested,
    checksums_around,
)

_LIBRARIES = ("openvino", "openvino-tokenizers", "nncf")
# Those of passes and of optimum-intel's exporter.
_TRAINING = ("optimum-intel", "diffusers", "transformers", "torch")


def write_manifest(
    folder: Path,
    components: Iterable[str],
    *,
    source: str,
    family: str,
    recipe: Recipe,
    suggested: Mapping[str, Any],
    baked: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
    accelerated: Iterable[Accelerated] = (),
    trained: bool = False,
) -> None:
    """Write sdvino.json into the finished ``folder``: precision, size and hashes of each component.

    ``source`` is a name, never a path. ``baked`` names the LoRAs and autoencoders that went in;
    ``quality`` is the gate's verdict; ``passes`` is what was done to the weights first, with
    figures, which passes.md tells as well; ``accelerated`` what pays on the devices that it was
    made for; ``trained`` tells whether the libraries of training took part.
    """
    manifest = Manifest(
        source=source,
        family=family,
        recipe=recipe.name,
        components={
            name: ManifestComponent.of(folder / name, recipe.treatment(name)) for name in components
        },
        files=checksums_around(folder),
        quality=quality,
        passes=tuple(passes),
        suggested=Suggested(**suggested),
        baked={} if baked is None else baked,
        accelerated=tuple(accelerated),
        versions=tool_versions(trained=trained),
    )
    if passes:
        report = passes_report(source, passes)
        (folder / PASSES_FILE).write_text(report, encoding="utf-8")
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def tool_versions(*, trained: bool) -> dict[str, str]:
    """Return the versions of the libraries that make a folder, without local build tags."""
    names = (*_LIBRARIES, *(_TRAINING if trained else ()))
    found = {name: text for name in names if (text := _version(name)) is not None}
    return {"sdvino": __version__, **found}


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
