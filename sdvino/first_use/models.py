"""The models on this machine: the bundled one, those converted at first use, those downloaded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sdvino.errors import ModelFolderError, RequestError
from sdvino.first_use.store import ConvertedModels, Entry, names_of, size_of
from sdvino.folder.hub import bundled_model
from sdvino.folder.index import INDEX_FILE
from sdvino.folder.manifest import Manifest

Kind = Literal["bundled", "converted", "interrupted", "downloaded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is here, or what an interrupted conversion has finished of one."""

    #: No other model's.
    name: str
    kind: Kind
    #: As `sdvino.json` has them; None where nothing says it.
    family: str | None
    recipe: str | None
    #: Whether the result was compared with the uncompressed model; None where nothing says it.
    compared: bool | None
    bytes: int
    #: When it was last used, in seconds since 1970, as far as the system tells.
    used: float | None
    #: The model folder, or the entry's.
    path: Path


def list_models(store: ConvertedModels) -> list[Model]:
    """Return every model, the bundled one first, of each kind the most recently used first."""
    bundled = []
    with contextlib.suppress(ModelFolderError):
        folder = bundled_model()
        bundled = [_model(folder.name, "bundled", folder, used=_last_read(folder))]
    entries = list(reversed(store.entries()))
    downloaded = _downloaded(entries)
    names = names_of(entries, [model.name for model in (*bundled, *downloaded)])
    kept = [_kept(entry, name) for entry, name in zip(entries, names, strict=True)]
    kept.sort(key=lambda model: model.kind)  # which keeps the order of use
    return [*bundled, *kept, *downloaded]


def remove_models(store: ConvertedModels, names: Sequence[str]) -> list[tuple[str, int]]:
    """Remove the converted models ``names`` and what is left of interrupted conversions.

    Returns each with the bytes that it had. Raises RequestError, before any is removed, for names
    of others and of none, and for a model that a process runs or converts.
    """
    found = {model.name: model for model in list_models(store)}
    chosen = []
    for name in dict.fromkeys(names):
        if name not in found:
            raise RequestError(f"There is no model {name[:200]!r}; `sdvino models` lists them.")
        if found[name].kind == "bundled":
            raise RequestError(f"{name} comes with sdvino and is not removed.")
        if found[name].kind == "downloaded":
            raise RequestError(
                f"{name} is in the hub's cache, which other programs use too; remove it with"
                " `hf cache`."
            )
        chosen.append((name, found[name]))
    entries = {entry.path: entry for entry in store.entries()}
    removed = []
    for name, model in chosen:
        entry = entries.get(model.path) or entries.get(model.path.parent)
        size = None if entry is None else store.remove(entry)
        if size is None:
            raise RequestError(f"{name} is run or converted by a process now; end that first.")
        removed.append((name, size))
    return removed


def _kept(entry: Entry, name: str) -> Model:
    if entry.complete:
        model = _model(name, "converted", entry.model, used=entry.used)
        return replace(model, bytes=entry.bytes)
    return Model(
        name=name,
        kind="interrupted",
        family=None,
        recipe=entry.made.recipe,
        compared=None,
        bytes=entry.bytes,
        used=entry.used,
        path=entry.path,
    )


def _model(name: str, kind: Kind, folder: Path, *, used: float | None) -> Model:
    manifest = None
    with contextlib.suppress(ModelFolderError):
        manifest = Manifest.read(folder)
    return Model(
        name=name,
        kind=kind,
        family=None if manifest is None else manifest.family,
        recipe=None if manifest is None else manifest.recipe,
        compared=None if manifest is None else manifest.quality is not None,
        bytes=size_of(folder),
        used=used,
        path=folder,
    )


def _downloaded(entries: Sequence[Entry]) -> list[Model]:
    """Return the OpenVINO models in the hub's cache, and those that ``entries`` are made from."""
    from huggingface_hub import constants

    sources = {entry.made.commit for entry in entries if entry.made.commit is not None}
    found = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")):
        runs = (folder / INDEX_FILE).is_file() and (folder / "unet/openvino_model.xml").is_file()
        if runs or folder.name in sources:
            name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            found.append(_model(name, "downloaded", folder, used=_last_read(folder)))
    count = Counter(model.name for model in found)
    found = [
        replace(model, name=f"{model.name}@{model.path.name[:6]}")
        if count[model.name] > 1
        else model
        for model in found
    ]
    return sorted(found, key=lambda model: -(0.0 if model.used is None else model.used))


def _last_read(folder: Path) -> float | None:
    """Return when the largest file of a model was last read, as the system tells."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda told: told.st_size).st_atime if files else None
