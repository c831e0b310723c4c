"""New files that never replace an old one unasked, and never stay half-written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from sdvino.errors import OutputError, RequestError

#: Numbers tried before giving up.
_MOST = 1_000_000
_PATTERN = re.compile(r"%(0?[1-9]?)d")


def choose_path(path: Path | str, *, overwrite: bool = False) -> Path:
    """Return where a file asked for as ``path`` would go.

    A ``%d`` (or ``%03d``) in the name becomes the first number, from 1, that is free, whatever
    ``overwrite`` says. Otherwise an existing ``circle.png`` makes it ``circle-2.png``,
    ``circle-3.png`` and so on, unless ``overwrite``. Raises RequestError for another % pattern.
    """
    path = Path(path)
    for candidate in candidates(path, overwrite=overwrite):
        if (overwrite and candidate == path) or not os.path.lexists(candidate):
            return candidate
    raise _crowded(path)


def candidates(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the names that `choose_path` tries, in order."""
    if "\0" in str(path):
        raise RequestError("The picture's name holds a zero byte; give another name.")
    patterns = _PATTERN.findall(path.name)
    if len(patterns) != path.name.count("%") or len(patterns) > 1:
        raise RequestError(
            f"The name {path.name!r} holds a % that is not one number;"
            " write one %d or %03d where the number goes."
        )
    if patterns:
        digits = int(patterns[0] or 0)
        for number in range(1, _MOST):
            text = f"{number:0{digits}d}" if patterns[0].startswith("0") else f"{number:{digits}d}"
            yield path.with_name(_PATTERN.sub(text, path.name))
        return
    yield path
    if not overwrite:
        for number in range(2, _MOST):
            yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_new(path: Path, content: bytes, *, overwrite: bool = False) -> Path:
    """Write ``content`` under the name that `choose_path` gives, whole or not at all; return it.

    The bytes go to a temporary file in the same folder first. Two processes that choose the same
    name at once get two names. Raises OutputError when the file cannot be written.
    """
    chosen = choose_path(path, overwrite=overwrite)
    temporary = chosen.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return _publish(temporary, path, overwrite=overwrite)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise now what `write_new` would raise later: the folder takes a file, the name is one."""
    choose_path(path)
    probe = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise output_error(path, error) from error


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> Path:
    """Give the finished file the first free name; return it."""
    for candidate in candidates(path, overwrite=overwrite):
        if overwrite and candidate == path:
            temporary.replace(candidate)
            return candidate
        if os.path.lexists(candidate):
            continue
        try:
            _claim(temporary, candidate)
        except FileExistsError:
            continue  # somebody was faster
        return candidate
    raise _crowded(path)


def _claim(temporary: Path, target: Path) -> None:
    """Move ``temporary`` to ``target``; raises FileExistsError instead of replacing a file."""
    if sys.platform == "win32":
        temporary.rename(target)  # replaces nothing on Windows
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links (exFAT): take the name first, then fill it.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(target)


def output_error(path: Path, error: OSError) -> OutputError:
    """Return, in one sentence, why ``path`` cannot be written and what to do."""
    folder = path.parent
    if error.errno == errno.ENOSPC or getattr(error, "winerror", None) == 112:
        return OutputError(f"The disk of {folder} is full; free some space and run it again.")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return OutputError(f"The folder {folder} is not there; create it, or choose another.")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return OutputError(f"{path} cannot be written; choose a folder that you may write to.")
    reason = error.strerror or str(error)
    return OutputError(f"{path} cannot be written ({reason}); choose another name or folder.")


def _crowded(path: Path) -> OutputError:
    return OutputError(f"There is no free name like {path.name} in {path.parent}; choose another.")
