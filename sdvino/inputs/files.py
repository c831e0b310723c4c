"""Files that somebody else wrote: regular ones alone, read within limits, inside their folder.

Their names as people give them, lists of prompts, and locks on our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sdvino.errors import ModelFolderError, RequestError
from sdvino.inputs.plain import NotPlain, parse_json

#: Configurations are a few kB; a larger file is something else.
MAX_JSON_BYTES = 4 * 2**20
_CHUNK = 2**20
#: Opening a FIFO waits for its writer, unless told not to; Windows ends lines unless told not to.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_GET_AGAIN = "get the model again"


def open_file(
    path: Path,
    what: str | None = None,
    *,
    limit: int | None = None,
    error: type[RequestError] = ModelFolderError,
    remedy: str = _GET_AGAIN,
) -> BinaryIO:
    """Open the regular file ``path`` for reading bytes.

    ``what`` is its name in messages (None: its path), and ``remedy`` what to do when it is not
    there or too large. Raises ``error`` in one sentence for what is no regular file (a folder, a
    FIFO, a device), is over ``limit`` bytes, or cannot be opened.
    """
    name = str(path) if what is None else what
    try:
        # Looked at before it is opened: opening a device may do something already.
        _check_regular(path.stat(), name, error)
        descriptor = os.open(path, _FLAGS)
    except RequestError:
        raise
    except FileNotFoundError as problem:
        raise error(f"{name} is missing; {remedy}.") from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{name} cannot be read ({reason}).") from problem
    file = os.fdopen(descriptor, "rb")
    try:
        told = os.fstat(descriptor)
        _check_regular(told, name, error)
        if limit is not None and told.st_size > limit:
            raise error(f"{name} is over {_size(limit)}, which no such file is; {remedy}.")
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(
    path: Path,
    what: str | None = None,
    *,
    limit: int,
    error: type[RequestError] = ModelFolderError,
    remedy: str = _GET_AGAIN,
) -> bytes:
    """Return the content of the regular file ``path``, ``limit`` bytes at most; see `open_file`."""
    name = str(path) if what is None else what
    with open_file(path, what, limit=limit, error=error, remedy=remedy) as file:
        try:
            raw = file.read(limit + 1)
        except OSError as problem:
            raise error(f"{name} cannot be read ({problem.strerror}).") from problem
    if len(raw) > limit:  # it grew, or is one of those that have no size
        raise error(f"{name} is over {_size(limit)}, which no such file is; {remedy}.")
    return raw


def read_text(
    path: Path,
    what: str | None = None,
    *,
    limit: int,
    error: type[RequestError] = ModelFolderError,
    remedy: str = _GET_AGAIN,
) -> str:
    """Return the UTF-8 text in ``path``, without a byte order mark; raises as `read_bytes` does."""
    raw = read_bytes(path, what, limit=limit, error=error, remedy=remedy)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        name = str(path) if what is None else what
        raise error(f"{name} is not UTF-8 text; save it as UTF-8.") from problem


def read_json(
    path: Path,
    what: str,
    *,
    limit: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """Return the JSON object in ``path``, plain as `sdvino.inputs.plain` has it.

    Raises ModelFolderError as `open_file` does, and for what is not JSON or no object.
    """
    try:
        value = parse_json(read_bytes(path, what, limit=limit))
    except NotPlain as problem:
        raise ModelFolderError(f"{what} is not valid JSON ({problem}); {_GET_AGAIN}.") from problem
    if not isinstance(value, dict):
        raise ModelFolderError(f"{what} does not hold a JSON object; {_GET_AGAIN}.")
    return value


def is_private(path: Path) -> bool:
    """Tell whether ``path`` belongs to this user and nobody else may write to it.

    Links are not followed. Windows keeps no such mode: there every folder counts as private.
    """
    told = path.lstat()
    if sys.platform == "win32":
        return not stat.S_ISLNK(told.st_mode)
    return told.st_uid == os.geteuid() and not told.st_mode & 0o022 and stat.S_ISDIR(told.st_mode)


def check_inside(path: Path, folder: Path) -> None:
    """Raise ModelFolderError when ``path`` leads out of ``folder`` through a link.

    The hub's cache keeps files as links from ``models--owner--name/snapshots/COMMIT/...`` to
    ``models--owner--name/blobs``: links of that form are allowed.
    """
    real = os.path.realpath(path)
    root = Path(os.path.realpath(folder))  # a loop of links stays as it is, and is not there
    roots = [root]
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        roots.append(repository / "blobs")  # where it really lies, so no link itself
    if not any(Path(real).is_relative_to(root) for root in roots):
        raise ModelFolderError(
            f"{path.relative_to(folder).as_posix()} is a link to a place outside the model folder;"
            " put the file itself there."
        )


def check_all_inside(folder: Path) -> None:
    """Raise ModelFolderError when anything in ``folder`` is a link to a place outside of it."""
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(base, name)
            if path.is_symlink():
                check_inside(path, folder)


def sha256_of(path: Path, *, limit: int | None = None) -> str:
    """Return the SHA-256 of the regular file ``path``, 64 hexadecimal digits; see `open_file`."""
    digest = hashlib.sha256()
    with open_file(path, limit=limit) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``path`` whole or not at all, in place of what is there; raises OSError."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` to ``path``, its keys sorted; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_regular(told: os.stat_result, name: str, error: type[RequestError]) -> None:
    if stat.S_ISDIR(told.st_mode):
        raise error(f"{name} is a folder; a file is wanted there.")
    if not stat.S_ISREG(told.st_mode):
        raise error(f"{name} is no ordinary file (a pipe, socket or device); put a file there.")


def _size(limit: int) -> str:
    return f"{limit // 2**20} MB" if limit >= 2**20 else f"{limit:,} bytes"


class FileLock:
    """A lock on the file ``path``, which is made when it is not there; raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock, waiting for its holder or not; tell whether it was taken."""
        try:
            if sys.platform == "win32":
                import msvcrt

                self._file.seek(0)
                mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK
                msvcrt.locking(self._file.fileno(), mode, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            self._file.close()
            return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):
            self._file.close()


def user_path(text: str | Path) -> Path:
    """Return the path that a person named, its ``~`` expanded; it need not exist.

    Raises RequestError for a home folder that is not known, and for a name that no file can have.
    """
    if "\0" in str(text):
        raise RequestError("A name of a file holds a zero byte; give another name.")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise RequestError(
            f"The home folder of {str(text)[:80]!r} is not known here; write the whole path."
        ) from error
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{str(path)[:80]!r} is no name that a file can have ({reason}); give another name."
        ) from error
    return path


#: Bytes of a list; a prompt has some hundred.
MAX_BYTES = 4 * 2**20


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts in the UTF-8 text file ``path``; empty lines and `#` lines are skipped.

    A line ends at a line feed, with or without a carriage return before it, and at nothing else.
    Raises RequestError for a file that is none, is over `MAX_BYTES`, or holds no prompt.
    """
    text = read_text(
        path, limit=MAX_BYTES, error=RequestError, remedy="give a text file with a prompt a line"
    )
    lines = (line.strip() for line in text.split("\n"))
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise RequestError(f"{path} holds no prompt; write one on each line.")
    return prompts
