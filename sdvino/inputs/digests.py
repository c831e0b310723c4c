"""What large files hold, known without reading them each time.

A file's SHA-256 is written down with what tells that it is still the same file: its place on the
disk, size, and times of change, of which the last cannot be set back by whoever may write the file.
Windows has no such time; there a file that was overwritten in place, with its time set back, passes
for the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from functools import lru_cache
from pathlib import Path

from sdvino.errors import ModelFolderError, RequestError
from sdvino.inputs.files import is_private, read_bytes, replace_file, sha256_of

_DIGEST = re.compile(rb"[0-9a-f]{64}")
#: Known files; the oldest go when there are twice as many.
_MOST = 500
#: A file that changed just now may change again without its times showing it.
_SETTLED_SECONDS = 2.0


def digest_of(path: Path, known: Path | None) -> str:
    """Return the SHA-256 of the file ``path``, 64 hexadecimal digits.

    ``known`` is the folder where digests are kept between runs; None keeps none. Raises
    ModelFolderError when the file cannot be read.
    """
    try:
        told = path.stat()
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read ({error.strerror}).") from error
    return _digest(str(path), _identity(told), known)


def kept_digest(path: Path, known: Path) -> str | None:
    """Return what `digest_of` would where an earlier run kept it, and None where it would read."""
    try:
        return _kept(known / _entry_name(_identity(path.stat())))
    except OSError:
        return None


def wrong_file(name: str) -> ModelFolderError:
    """Return what to raise for the file ``name`` whose SHA-256 is another than its manifest's."""
    return ModelFolderError(
        f"{name} is not the file that sdvino.json was written for: its SHA-256 differs;"
        " get the model again."
    )


@lru_cache(maxsize=64)
def _digest(path: str, identity: tuple[int, ...], known: Path | None) -> str:
    entry = None if known is None else known / _entry_name(identity)
    if entry is not None and (kept := _kept(entry)) is not None:
        return kept
    digest = sha256_of(Path(path))
    if entry is not None and time.time() - max(identity[3:]) / 1e9 > _SETTLED_SECONDS:
        _keep(entry, digest)
    return digest


def _identity(told: os.stat_result) -> tuple[int, ...]:
    return (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)


def _entry_name(identity: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _kept(entry: Path) -> str | None:
    """Return what ``entry`` says; None where there is none, or one that is not ours."""
    try:
        if not is_private(entry.parent):
            return None
        text = read_bytes(entry, limit=64)
    except (OSError, RequestError):
        return None
    return text.decode() if _DIGEST.fullmatch(text) is not None else None


def _keep(entry: Path, digest: str) -> None:
    with contextlib.suppress(OSError):  # the digest is worth a second, not an error
        entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(entry.parent):
            return
        replace_file(entry, digest)
        entries = sorted(entry.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        if len(entries) > 2 * _MOST:
            for path in entries[:-_MOST]:
                path.unlink()
