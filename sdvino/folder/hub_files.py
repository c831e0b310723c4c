"""What a repository on the Hugging Face hub holds, and downloads of it within bounds.

What a hub says is not taken for true: everything comes from the one commit whose files were listed,
and no more of it than was told and allowed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sdvino.errors import ModelFolderError, OutputError, RequestError, SdvinoError
from sdvino.inputs.shown import shown_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import tqdm

_log = logging.getLogger("sdvino")

#: Bytes that one download may bring unless more is asked for: twice Stable Diffusion XL in single
#: precision (14 GB), the largest of what sdvino runs; more is a slip or somebody's ill will.
MAX_DOWNLOAD = 32 * 10**9
#: Files in a repository; the largest of people's collections have a few thousand.
MAX_FILES = 10_000
# Kinds of files that are small, and the bytes that one counts where the hub does not tell them:
# vocabularies take a few MB.
_SMALL = (".json", ".txt")
_SMALL_BYTES = 10**7
# No disk holds more, and sums and formats of it stay exact.
_MOST_BYTES = 2**63
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository on the hub holds."""

    model: str
    #: The commit that the revision stands for.
    commit: str
    #: File -> bytes; None where the hub does not tell them.
    sizes: Mapping[str, int | None]

    def most_bytes(self, name: str) -> int:
        """Return the bytes of a file, or the most that one of unknown size may have."""
        told = self.sizes[name]
        return _SMALL_BYTES if told is None else told


@contextlib.contextmanager
def answers(model: str, revision: str | None) -> Iterator[HfApi]:
    """Turn answers that there is no such model, and answers that are none, into sentences."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
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
    except HFValidationError as error:
        raise ModelFolderError(f"{model!r} is no hub id (owner/name); correct it.") from error
    except json.JSONDecodeError as error:  # the page where one logs in to a network, as a rule
        raise ConnectionError("what answers is no hub") from error
    except (SdvinoError, OSError):  # the latter are of the network; some are ValueErrors as well
        raise
    # huggingface_hub reads the answers as if they were always in order.
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise _strange(model, f"could not be read ({type(error).__name__})") from error


def _strange(model: str, what: str) -> ModelFolderError:
    return ModelFolderError(
        f"What the hub says of {model} {what}; try again later, or choose another model."
    )


def read_listing(model: str, revision: str | None) -> Listing:
    """Return what the repository holds at ``revision``; raises ModelFolderError, network errors.

    Names that no file below a folder has are left out: nothing asks for them.
    """
    with answers(model, revision) as hub:
        info = hub.model_info(model, revision=revision, files_metadata=True)
    commit: object = info.sha
    if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
        raise _strange(model, "names no commit")
    if revision is not None and revision != commit and _COMMIT.fullmatch(revision) is not None:
        raise _strange(model, "is about another commit than was asked for")
    found = [] if info.siblings is None else info.siblings
    if len(found) > MAX_FILES:
        raise ModelFolderError(
            f"{model} has {len(found)} files, more than the {MAX_FILES} that sdvino looks through;"
            " choose another model."
        )
    sizes = {file.rfilename: _bytes(file.size) for file in found if _is_file_name(file.rfilename)}
    return Listing(model, commit, sizes)


def _bytes(value: object) -> int | None:
    """Return a size as a hub tells it; None for what is none."""
    # Not isinstance: True is no size.
    return value if type(value) is int and 0 <= value < _MOST_BYTES else None


def _is_file_name(name: object) -> bool:
    """Tell whether a file below a folder may have this name, with / between, on any system."""
    if not isinstance(name, str) or not name.isprintable() or re.search(r"[\\:]", name):
        return False
    parts = name.split("/")
    return (
        len(name) <= 1000
        and not any(part in ("", ".", "..") for part in parts)
        and max(len(part.encode()) for part in parts) <= 255
    )


def network_errors() -> tuple[type[Exception], ...]:
    """Return what a hub that cannot be reached raises.

    huggingface_hub 0 stands on requests, whose exceptions are OSErrors; 1 on httpx, whose
    exceptions have a root that HfHubHTTPError derives from.
    """
    from huggingface_hub.errors import HfHubHTTPError

    roots = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (OSError, *roots)


def is_cached(listing: Listing, name: str, cache_dir: Path | None = None) -> bool:
    """Tell whether the file ``name`` was downloaded before, to ``cache_dir`` or the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        listing.model, name, cache_dir=cache_dir, revision=listing.commit
    )
    return isinstance(found, str)


def download_limit(max_download: int | None) -> int:
    """Return the most bytes that a download may bring; raises RequestError for none."""
    if max_download is not None and max_download <= 0:
        raise RequestError(f"The download limit is {max_download}; give a number of bytes.")
    return MAX_DOWNLOAD if max_download is None else max_download


def check_size(listing: Listing, names: Iterable[str], max_download: int | None = None) -> int:
    """Return the bytes of the files ``names``; raises RequestError above ``max_download``.

    A file of unknown size is too large, but for kinds that are small.
    """
    limit = download_limit(max_download)
    names = list(names)
    for name in names:
        if listing.sizes[name] is None and not name.endswith(_SMALL):
            raise RequestError(
                f"The hub does not say how large {name} of {listing.model} is; choose another"
                " model, or download it by other means and give its folder."
            )
    size = sum(listing.most_bytes(name) for name in names)
    if size > limit:
        raise RequestError(
            f"{listing.model} would download {shown_size(size)}, and the limit is"
            f" {shown_size(limit)}; raise it with --max-download {-(-size // 10**9)}GB, or choose a"
            " smaller model."
        )
    return size


def read_remote_header(listing: Listing, name: str) -> Mapping[str, Any]:
    """Return the header of a safetensors file on the hub, as its JSON has it; no weight is read.

    Raises ModelFolderError for a file that is none, SdvinoError when the hub cannot be reached.
    """
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        with answers(listing.model, listing.commit) as hub:
            found = hub.parse_safetensors_file_metadata(
                listing.model, name, revision=listing.commit
            )
            tensors = {
                tensor: {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "data_offsets": list(info.data_offsets),
                }
                for tensor, info in found.tensors.items()
            }
            return {"__metadata__": dict(found.metadata), **tensors}
    except SafetensorsParsingError as error:
        raise ModelFolderError(
            f"{listing.model}/{name} is damaged or not a safetensors file; choose another."
        ) from error
    except network_errors() as error:
        raise SdvinoError(
            f"The hub cannot be reached ({type(error).__name__}); try again with a connection."
        ) from error


def download(
    listing: Listing,
    wanted: Sequence[str],
    cache_dir: Path | None,
    limit: int,
    progress: Callable[[str], None],
) -> Path:
    """Download those of the files ``wanted`` that are not there yet; return their folder.

    limit: the most bytes that this may bring. progress: told, in a line, how much it is.
    Raises RequestError for more, OutputError for a disk too small, ModelFolderError when something
    else comes than was listed, and network errors.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) if cache_dir is None else cache_dir
    repository = cache / repo_folder_name(repo_id=listing.model, repo_type="model")
    missing = [name for name in wanted if not is_cached(listing, name, cache_dir)]
    if missing:
        size = check_size(listing, missing, limit)
        _check_disk(listing.model, size, repository)
        progress(f"Downloading {listing.model}: {len(missing)} files, {shown_size(size)}.")
        _bring(listing, missing, cache, repository)
    return repository / "snapshots" / listing.commit


def _check_disk(model: str, size: int, repository: Path) -> None:
    """Raise OutputError where ``size`` bytes would fill the disk."""
    standing = next((folder for folder in repository.absolute().parents if folder.is_dir()), Path())
    # What an earlier download left unfinished is replaced or gone on with.
    room = shutil.disk_usage(standing).free + _bytes_below(repository, "*.incomplete")
    if room < size:
        raise OutputError(
            f"{model} needs {shown_size(size)} on the disk of the hub's cache and"
            f" {shown_size(room)} are free; free some space, or set HF_HOME to a folder on another"
            " disk."
        )


def _bytes_below(repository: Path, pattern: str = "*", but: frozenset[str] = frozenset()) -> int:
    """Return the bytes of the blobs in a repository's cache, finished or not."""
    total = 0
    for blob in (repository / "blobs").glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # finished, and called otherwise now
            total += 0 if blob.name in but else blob.stat().st_size
    return total


def _bring(listing: Listing, names: Sequence[str], cache: Path, repository: Path) -> None:
    """Download the files ``names`` of the listed commit, and keep what is as large as listed.

    Raises ModelFolderError when something else comes, network errors when not everything does.
    """
    from huggingface_hub import snapshot_download

    before = frozenset(blob.name for blob in (repository / "blobs").glob("*"))
    most = sum(listing.most_bytes(name) for name in names)
    folder = repository / "snapshots" / listing.commit
    wrong: list[str] = []
    try:
        with answers(listing.model, listing.commit):
            answer = snapshot_download(
                listing.model,
                revision=listing.commit,
                cache_dir=cache,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_stopping_bar(listing.model, most, repository, before),
            )
    finally:
        # Also when it broke off: what is there now is not looked at again.
        wrong = [name for name in names if _remove_wrong(folder / name, listing.sizes[name])]
    if Path(answer).name != listing.commit:
        raise _strange(listing.model, "is about another commit than was asked for")
    if wrong:
        raise _strange(
            listing.model,
            f"is not so: {wrong[0]} came in another size than was told, and was removed",
        )
    if not all((folder / name).is_file() for name in names):
        raise ConnectionError("not everything has arrived")  # as when the connection goes


def _stopping_bar(model: str, most: int, repository: Path, before: frozenset[str]) -> type[tqdm]:
    """Return the hub's progress bar, which ends a download that brings over ``most`` bytes.

    huggingface_hub tells bars of each chunk since 1.0; before, only the size afterwards is checked.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class StoppingBar(tqdm):
        came = 0

        def update(self, n: float | None = 1) -> bool | None:
            StoppingBar.came += 0 if n is None else int(n)
            # What is fetched again after a broken connection may be told twice, so the disk is
            # asked as well; it alone would not do where another process downloads too.
            if StoppingBar.came > most and _bytes_below(repository, but=before) > most:
                raise _strange(model, "is not so: more came than was told")
            shown: bool | None = super().update(n)
            return shown

    return StoppingBar


def _remove_wrong(path: Path, told: int | None) -> bool:
    """Remove a download of another size than the hub told, and tell whether it was."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    if size <= _SMALL_BYTES if told is None else size == told:
        return False
    blob = path.resolve()
    path.unlink()
    if blob.parent.name == "blobs":  # else it would be linked to again
        blob.unlink(missing_ok=True)
    return True


def note_commit(folder: Path, revision: str | None) -> None:
    """Note in the cache that ``revision`` stands for the commit of ``folder``, for offline starts.

    That is refs/REVISION, as huggingface_hub writes it itself when it is not told a commit; like
    there, a cache that cannot be written to is no error.
    """
    from huggingface_hub import constants

    name = constants.DEFAULT_REVISION if revision is None else revision
    if name == folder.name:
        return
    ref = folder.parent.parent / "refs" / name
    temporary = ref.with_name(f"{ref.name}.{uuid4().hex[:8]}.tmp")
    try:
        if ref.is_file() and ref.read_bytes() == folder.name.encode():
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(folder.name.encode())
            temporary.replace(ref)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s could not be written (%s).", ref, error.strerror)
