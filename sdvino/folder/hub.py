"""Where a model comes from: the bundled demo, a folder, or the Hugging Face hub.

Only what running needs is downloaded: IR files, configurations and tokenizers. Torch weights,
pickles and code in a repository stay there.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.folder.hub_files import (
    Listing,
    download,
    download_limit,
    network_errors,
    note_commit,
    read_listing,
)
from sdvino.inputs.files import user_path
from sdvino.inputs.shown import lines
from sdvino.settings import COMPONENTS

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]|/(?!/)){0,250}")
_PARTS = "|".join(COMPONENTS)
#: Every file that running a model folder reads, and nothing else.
_WANTED = re.compile(
    rf"model_index\.json|sdvino\.json|(?:{_PARTS})/(?:openvino_model\.(?:xml|bin)|config\.json)"
    r"|scheduler/scheduler_config\.json|tokenizer(?:_2)?/[A-Za-z0-9_-]+\.(?:json|txt)"
)

Report = Callable[[str], None]
#: Takes the names of the files in a repository and returns those to have; raises ModelFolderError
#: when what is needed is not among them.
Choose = Callable[[Sequence[str]], Sequence[str]]


class NotConverted(ModelFolderError):
    """A repository on the hub holds a model that is yet to be converted."""


class NotDownloaded(SdvinoError):
    """A model on the hub was not downloaded before, and the hub is out of reach."""


def report_to_stderr(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"sdvino: {lines(message)}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How the hub is asked. Raises RequestError for what is no revision."""

    #: Branch, tag or commit; None: the main one.
    revision: str | None = None
    #: Where downloads are kept; None: the hub's own cache.
    cache_dir: Path | None = None
    #: Ask nobody: what is in the cache will do. HF_HUB_OFFLINE says so too.
    offline: bool = False
    #: The most bytes that a download may bring; None: 32 GB.
    max_download: int | None = None
    #: Told, in a line, the size of what is about to be downloaded.
    report: Report = report_to_stderr

    def __post_init__(self) -> None:
        revision = self.revision
        if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
            raise RequestError(
                f"{revision[:80]!r} is no revision; give a branch, a tag or a commit."
            )

    @property
    def is_asked(self) -> bool:
        """Whether there is to be a connection."""
        from huggingface_hub import constants

        return not (self.offline or constants.HF_HUB_OFFLINE)


def resolve_model(model: str | Path | None, **hub: Any) -> Path:
    """Return the folder of ``model``, downloading it when need be.

    None is the bundled demo model; a folder is returned as it is (an existing one goes before a hub
    id of the same name); ``owner/name`` is a ready-made OpenVINO model on the hub, asked as the
    fields of `Hub` say, and from the cache when it cannot be reached. A download that was cut off
    is resumed.

    Raises ModelFolderError when there is no such model or it is not an OpenVINO one, RequestError
    when it is too large, OutputError when the disk is too small for it, SdvinoError when the hub
    cannot be reached and nothing was downloaded before.
    """
    if model is None:
        return bundled_model()
    path = local_model(model)
    if path is not None:
        return path
    name = str(model)
    if not is_hub_id(name):
        raise not_found(name)
    return fetch(name, lambda names: runnable_files(name, names), Hub(**hub))


def local_model(model: str | Path) -> Path | None:
    """Return the path that ``model`` names on this machine; None where a hub id is left.

    A `Path` is one in any case. Raises RequestError for a name that no file can have.
    """
    path = user_path(model)
    try:
        exists = model != "" and path.exists()
    except OSError:  # a name too long for a file
        exists = False
    return path if exists or isinstance(model, Path) else None


def not_found(model: str) -> ModelFolderError:
    """Return what to raise for a model that is neither here nor named as on the hub."""
    return ModelFolderError(
        f"There is no folder or file {model[:200]!r}, and it is no hub id (owner/name) either;"
        " leave -m out for the bundled demo model."
    )


def is_hub_id(text: str) -> bool:
    """Tell whether ``text`` has the form of a hub id, owner/name."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch(model: str, choose: Choose, hub: Hub) -> Path:
    """Return the folder of those files of the repository ``model`` that ``choose`` picks.

    Raises as `resolve_model` does.
    """
    limit = download_limit(hub.max_download)
    if not hub.is_asked:
        complaint = f"{model} was not downloaded before, and sdvino is offline"
        return _from_cache(model, choose, hub, complaint)
    listing: Listing | None = None
    try:
        listing = read_listing(model, hub.revision)
        wanted = list(dict.fromkeys(choose(list(listing.sizes))))
        folder = download(listing, wanted, hub.cache_dir, limit, hub.report)
        # Only now: what is here of the commit before is whole, and this was not until now.
        note_commit(folder, hub.revision)
        return folder
    except network_errors() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        complaint = (
            f"The hub cannot be reached ({type(error).__name__}), and {model} was not downloaded"
            " before"
        )
        folder = _from_cache(model, choose, hub, complaint, error)
        if listing is not None and folder.name == listing.commit:  # what just broke off
            raise _not_here(complaint, hub.revision) from error
        hub.report("The hub cannot be reached; using the copy that was downloaded before.")
        return folder


def bundled_model() -> Path:
    """Return the folder of the demo model that comes with sdvino."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "models" / "shapes", package.parent / "models" / "shapes"):
        if folder.is_dir():
            return folder
    raise ModelFolderError(
        "The bundled demo model is not part of this installation; name a model folder with -m."
    )


def list_files(model: str, hub: Hub) -> Listing | None:
    """Return what the repository ``model`` holds; None when offline, or the hub is out of reach.

    Raises ModelFolderError when there is no such model.
    """
    if not hub.is_asked:
        return None
    try:
        return read_listing(model, hub.revision)
    except network_errors():
        return None


def snapshot_here(model: str, hub: Hub) -> Path | None:
    """Return the folder of what was downloaded of ``model`` before, called as its commit is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def _from_cache(
    model: str, choose: Choose, hub: Hub, complaint: str, cause: Exception | None = None
) -> Path:
    """Return what was downloaded before; raises SdvinoError with ``complaint`` if nothing was."""
    folder = snapshot_here(model, hub)
    if folder is None:
        raise _not_here(complaint, hub.revision) from cause
    choose(names_in(folder))
    return folder


def names_in(folder: Path) -> list[str]:
    """Return the files of a snapshot in the hub's cache; only what is whole is linked to there."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _not_here(complaint: str, revision: str | None) -> NotDownloaded:
    what = "" if revision is None else f" at revision {revision}"
    return NotDownloaded(f"{complaint}{what}; connect once, or give the folder of a model with -m.")


def runnable_files(model: str, names: Sequence[str]) -> list[str]:
    """Return those of the files ``names`` of a repository that running needs.

    Raises NotConverted where it holds other weights than OpenVINO's, ModelFolderError where none.
    """
    wanted = [name for name in names if _WANTED.fullmatch(name) is not None]
    if "unet/openvino_model.xml" not in wanted:
        raise _no_openvino(model, names)
    return wanted


def _no_openvino(model: str, names: Sequence[str]) -> ModelFolderError:
    if any(name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin")) for name in names):
        return NotConverted(
            f"{model} holds torch weights, not an OpenVINO model; run"
            f" `sdvino convert {model} FOLDER` first, or look on the hub for the same model in"
            " OpenVINO format."
        )
    return ModelFolderError(
        f"{model} has no unet/openvino_model.xml, or its download was cut off;"
        " run again with a connection, or choose another model."
    )
