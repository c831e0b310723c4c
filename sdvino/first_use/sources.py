"""What models are converted from at first use, and what tells one from another: the content.

A file is known by its SHA-256, a diffusers folder by those of the files that converting reads, a
model on the hub by its commit and the files chosen from it. What they are called does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdvino.errors import RequestError
from sdvino.first_use.store import Made
from sdvino.folder.hub import (
    Hub,
    NotDownloaded,
    fetch,
    list_files,
    names_in,
    snapshot_here,
)
from sdvino.folder.hub_files import note_commit
from sdvino.inputs.digests import digest_of, kept_digest
from sdvino.inputs.files import sha256_of
from sdvino.runtime.cache import cache_key, default_cache_dir
from sdvino.text.vocabulary import MAX_FILE_BYTES
from sdvino.weights.safetensors import open_tensors

if TYPE_CHECKING:
    from sdvino.compress.thresholds import GateSettings
    from sdvino.convert.request import Request

#: What of a diffusers folder converting reads.
_AROUND = ("model_index.json", "sdvino.json", "calibration_prompts.txt")
_FOLDERS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tiny_vae",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "vae",
)
_KINDS = (".json", ".safetensors", ".txt")
#: Smaller files are read each time; the digests of others are kept.
_SMALL_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A checkpoint file, or a diffusers folder."""

    path: Path
    #: As the caller gave it; files have none.
    revision: str | None = None

    @property
    def name(self) -> str:
        """Return the file's name without its ending, or the folder's."""
        return self.path.stem if self.path.is_file() else self.path.resolve().name

    def key(self) -> str:
        """Return what the content is known by. Large files are read where nobody did before."""
        if self.path.is_file():
            return cache_key("file", *map(_digest, self._files()))
        rows = [(f.relative_to(self.path).as_posix(), _digest(f)) for f in self._files()]
        return cache_key("folder", rows)

    @property
    def unread(self) -> int:
        """Return the bytes that `key` would read, but for small files."""
        large = [file for file in self._files() if not _is_small(file) and _is_sound(file)]
        return sum(file.stat().st_size for file in large if kept_digest(file, _digests()) is None)

    def made(self, recipe: str, source: str) -> Made:
        """Return what to write down of a model that is made from it."""
        return Made(name=self.name, recipe=recipe, source=source)

    def outline(self, recipe: str | Path, gate: GateSettings | None) -> Request:
        """Return the request to look ahead with."""
        from sdvino.convert.api import make_request

        return make_request(self.path, recipe=recipe, gate=gate, revision=self.revision)

    def request(self, recipe: str | Path, gate: GateSettings | None) -> Request:
        """Return the request to convert by."""
        return self.outline(recipe, gate)

    def _files(self) -> Iterator[Path]:
        if self.path.is_file():
            yield self.path
            return
        yield from (path for name in _AROUND if (path := self.path / name).is_file())
        for name in _FOLDERS:
            folder = self.path / name
            if folder.is_dir():
                files = (path for path in folder.iterdir() if path.suffix in _KINDS)
                yield from sorted(path for path in files if path.is_file())


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model on the hub, listed and not downloaded yet."""

    #: owner/name, or owner/name/FILE.safetensors.
    name: str
    #: owner/name.
    model: str
    #: How the hub is asked, and the commit that the revision stands for.
    hub: Hub
    commit: str
    #: The files that converting reads -> bytes.
    sizes: Mapping[str, int | None]

    #: Nothing has to be read to know which it is.
    unread = 0

    def key(self) -> str:
        """Return what the content is known by."""
        return cache_key("hub", self.model, self.commit, sorted(self.sizes.items()))

    def made(self, recipe: str, source: str) -> Made:
        """Return what to write down of a model that is made from it."""
        return Made(
            name=self.name.removesuffix(".safetensors"),
            recipe=recipe,
            source=source,
            hub=self.name,
            revision=self.hub.revision,
            commit=self.commit,
        )

    def outline(self, recipe: str | Path, gate: GateSettings | None) -> Request:
        """Return the request to look ahead with; only what is small is downloaded for it."""
        from sdvino.convert.api import make_request

        if self.hub.cache_dir is not None:  # looking ahead knows no other cache than the hub's own
            return self.request(recipe, gate)
        return make_request(
            self.name,
            recipe=recipe,
            gate=gate,
            revision=self.commit,
            offline=self.hub.offline,
            max_download=self.hub.max_download,
            download=False,
        )

    def request(self, recipe: str | Path, gate: GateSettings | None) -> Request:
        """Return the request to convert by, once everything is downloaded."""
        from sdvino.convert.api import make_request

        folder = fetch(self.model, self._choose, replace(self.hub, revision=self.commit))
        note_commit(folder, self.hub.revision)
        # A single file is all that is chosen, or the index of a folder is among it.
        path = folder / next(iter(self.sizes)) if len(self.sizes) == 1 else folder
        return replace(make_request(path, recipe=recipe, gate=gate), source_name=self.name)

    def _choose(self, names: Sequence[str]) -> list[str]:
        return list(self.sizes)


def find_on_hub(name: str, hub: Hub) -> HubSource:
    """Return what there is to convert of the model ``name`` on the hub.

    name: owner/name, or owner/name/FILE.safetensors. Raises ModelFolderError where there is
    nothing to convert, NotDownloaded where the hub is out of reach and nothing was downloaded.
    """
    from sdvino.convert.hub_source import choose_files, split_file

    model, file = split_file(name)
    listing = list_files(model, hub)
    if listing is not None:
        commit, sizes = listing.commit, dict(listing.sizes)
    else:
        folder = snapshot_here(model, hub)
        if folder is None:
            raise NotDownloaded(
                f"{model} was not downloaded before, and the hub is out of reach; connect once, or"
                " give a checkpoint or the folder of a model with -m."
            )
        commit = folder.name
        sizes = {name: (folder / name).stat().st_size for name in names_in(folder)}
    chosen = {name: sizes[name] for name in choose_files(model, file, list(sizes))}
    return HubSource(name=name, model=model, hub=hub, commit=commit, sizes=chosen)


def _digests() -> Path:
    """Return where the digests of large files are kept: with those of the weights that are run."""
    return default_cache_dir() / "digests"


def _digest(path: Path) -> str:
    if not _is_sound(path):
        return f"unread, {path.stat().st_size}"  # converting says what is wrong with it
    return sha256_of(path) if _is_small(path) else digest_of(path, _digests())


def _is_sound(path: Path) -> bool:
    """Tell whether ``path`` is no larger than its kind can be, so that it may be read whole."""
    if path.suffix != ".safetensors":
        return path.stat().st_size <= MAX_FILE_BYTES
    try:
        open_tensors([path])  # the header says where the file ends
    except RequestError:
        return False
    return True


def _is_small(path: Path) -> bool:
    return path.stat().st_size <= _SMALL_BYTES
