"""Where a model comes from: the bundled demo, a folder, or the Hugging Face hub.

Only what running needs is downloaded: IR files, configurations and tokenizers. Torch weights,
pickles and code in a repository stay there.
"""

from __future__ import annotations

import errno
import glob
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.settings import COMPONENTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

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


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository on the hub holds."""

    model: str
    #: The commit that the revision stands for.
    commit: str
    #: File -> bytes.
    sizes: Mapping[str, int]


def report_to_stderr(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"sdvino: {message}\n")


def resolve_model(
    model: str | Path | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Report = report_to_stderr,
) -> Path:
    """Return the folder of ``model``, downloading it when need be.

    None is the bundled demo model; a folder is returned as it is (an existing one goes before a hub
    id of the same name); ``owner/name`` is a ready-made OpenVINO model on the hub, at ``revision``
    (branch, tag or commit), kept in ``cache_dir`` or the hub's own cache, from which it comes when
    ``offline``, when HF_HUB_OFFLINE is set, or when the hub cannot be reached. A download that was
    cut off is resumed. ``progress`` is told, in a line, the size of what is about to be downloaded.

    Raises ModelFolderError when there is no such model or it is not an OpenVINO one, SdvinoError
    when the hub cannot be reached and nothing was downloaded before.
    """
    if model is None:
        return bundled_model()
    path = Path(model).expanduser()
    try:
        exists = model != "" and path.exists()
    except OSError:  # a name too long for a file
        exists = False
    if exists or isinstance(model, Path):
        return path
    if not is_hub_id(model):
        raise ModelFolderError(
            f"There is no folder {model[:200]!r}, and it is no hub id (owner/name) either;"
            " leave -m out for the bundled demo model."
        )
    return fetch(
        model,
        lambda names: _choose_runnable(model, names),
        revision=revision,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )


def is_hub_id(text: str) -> bool:
    """Tell whether ``text`` has the form of a hub id, owner/name."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch(
    model: str,
    choose: Choose,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Report = report_to_stderr,
) -> Path:
    """Return the folder of those files of the repository ``model`` that ``choose`` picks.

    The rest is as in `resolve_model`.
    """
    _check_revision(revision)
    cache = None if cache_dir is None else Path(cache_dir)
    return _from_hub(model, choose, revision, cache, offline, progress)


def bundled_model() -> Path:
    """Return the folder of the demo model that comes with sdvino."""
    package = Path(__file__).resolve().parent
    for folder in (package / "models" / "shapes", package.parent / "models" / "shapes"):
        if folder.is_dir():
            return folder
    raise ModelFolderError(
        "The bundled demo model is not part of this installation; name a model folder with -m."
    )


def list_files(model: str, *, revision: str | None = None, offline: bool = False) -> Listing | None:
    """Return what the repository ``model`` holds; None when offline, or the hub is out of reach.

    Raises ModelFolderError when there is no such model, RequestError for no revision.
    """
    from huggingface_hub import constants

    _check_revision(revision)
    if offline or constants.HF_HUB_OFFLINE:
        return None
    try:
        with _answers(model, revision) as hub:
            info = hub.model_info(model, revision=revision, files_metadata=True)
    except _network_errors():
        return None
    found = [] if info.siblings is None else info.siblings
    sizes = {file.rfilename: 0 if file.size is None else file.size for file in found}
    return Listing(model, str(info.sha), sizes)


def is_cached(listing: Listing, name: str) -> bool:
    """Tell whether the file ``name`` was downloaded before, to the hub's own cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(listing.model, name, revision=listing.commit), str)


def read_remote_header(listing: Listing, name: str) -> Mapping[str, Any]:
    """Return the header of a safetensors file on the hub, as its JSON has it; no weight is read.

    Raises ModelFolderError for a file that is none, SdvinoError when the hub cannot be reached.
    """
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        with _answers(listing.model, listing.commit) as hub:
            found = hub.parse_safetensors_file_metadata(
                listing.model, name, revision=listing.commit
            )
    except SafetensorsParsingError as error:
        raise ModelFolderError(
            f"{listing.model}/{name} is damaged or not a safetensors file; choose another."
        ) from error
    except _network_errors() as error:
        raise SdvinoError(
            f"The hub cannot be reached ({type(error).__name__}); try again with a connection."
        ) from error
    tensors = {
        tensor: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for tensor, info in found.tensors.items()
    }
    return {"__metadata__": dict(found.metadata), **tensors}


def _check_revision(revision: str | None) -> None:
    if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise RequestError(f"{revision[:80]!r} is no revision; give a branch, a tag or a commit.")


def _from_hub(
    model: str,
    choose: Choose,
    revision: str | None,
    cache_dir: Path | None,
    offline: bool,
    progress: Report,
) -> Path:
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(
            model,
            choose,
            revision,
            cache_dir,
            f"{model} was not downloaded before, and sdvino is offline",
        )
    try:
        with _answers(model, revision) as hub:
            info = hub.model_info(model, revision=revision, files_metadata=True)
            return _download(info, model, choose, revision, cache_dir, progress)
    except _network_errors() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        folder = _from_cache(
            model,
            choose,
            revision,
            cache_dir,
            f"The hub cannot be reached ({type(error).__name__}), and {model} was not downloaded"
            " before",
            error,
        )
        progress("The hub cannot be reached; using the copy that was downloaded before.")
        return folder


@contextmanager
def _answers(model: str, revision: str | None) -> Iterator[HfApi]:
    """Turn the hub's answers that there is no such model into ModelFolderErrors."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield HfApi()
    except RevisionNotFoundError as error:
        raise ModelFolderError(
            f"{model} has no revision {revision!r} on the hub; leave --revision out or correct it."
        ) from error
    except GatedRepoError as error:
        raise ModelFolderError(
            f"{model} asks for its terms to be accepted on its page at the hub; do that, run"
            " `hf auth login`, and try again."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFolderError(
            f"There is no folder {model!r} here and no model of that name on the hub (a private one"
            " needs `hf auth login`); check the spelling."
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what a hub that cannot be reached raises.

    huggingface_hub 0 stands on requests, whose exceptions are OSErrors; 1 on httpx, whose
    exceptions have a root that HfHubHTTPError derives from.
    """
    from huggingface_hub.errors import HfHubHTTPError

    roots = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (OSError, *roots)


def _download(
    info: ModelInfo,
    model: str,
    choose: Choose,
    revision: str | None,
    cache_dir: Path | None,
    progress: Report,
) -> Path:
    """Download what `info` lists and ``choose`` picks, and is not there yet."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    found = [] if info.siblings is None else info.siblings
    wanted = set(choose([f.rfilename for f in found]))
    sizes = {f.rfilename: f.size for f in found if f.rfilename in wanted}
    missing = [
        name
        for name in sizes
        if not isinstance(
            try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=info.sha), str
        )
    ]
    if missing:
        size = sum(sizes[name] or 0 for name in missing)
        progress(f"Downloading {model}: {len(missing)} files, {_megabytes(size)}.")
    # Also when nothing is missing: it notes which commit the revision now stands for.
    return Path(
        snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[glob.escape(name) for name in sizes],
        )
    )


def _from_cache(
    model: str,
    choose: Choose,
    revision: str | None,
    cache_dir: Path | None,
    complaint: str,
    cause: Exception | None = None,
) -> Path:
    """Return what was downloaded before; raises SdvinoError with ``complaint`` if nothing was."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        what = "" if revision is None else f" at revision {revision}"
        raise SdvinoError(
            f"{complaint}{what}; connect once, or give the folder of a model with -m."
        ) from (error if cause is None else cause)
    # Only what is whole is linked to from here.
    choose([p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
    return folder


def _choose_runnable(model: str, names: Sequence[str]) -> list[str]:
    """Return the files that running needs; raises ModelFolderError without an OpenVINO UNet."""
    wanted = [name for name in names if _WANTED.fullmatch(name) is not None]
    if "unet/openvino_model.xml" not in wanted:
        raise _no_openvino(model, names)
    return wanted


def _no_openvino(model: str, names: Sequence[str]) -> ModelFolderError:
    if any(name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin")) for name in names):
        return ModelFolderError(
            f"{model} holds torch weights, not an OpenVINO model; run"
            f" `sdvino convert {model} FOLDER` first, or look on the hub for the same model in"
            " OpenVINO format."
        )
    return ModelFolderError(
        f"{model} has no unet/openvino_model.xml, or its download was cut off;"
        " run again with a connection, or choose another model."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
