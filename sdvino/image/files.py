"""New files that never replace an old one unasked, and never stay half-written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sdvino.errors import OutputError, RequestError

#: Numbers tried before giving up.
_MOST = 1_000_000
#: Where Linux shows the files that a process has open, by number.
_OPEN_FILES = "/proc/self/fd"
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

    The bytes go to another file in the same folder first. Two processes that choose the same name
    at once get two names. Raises OutputError when the file cannot be written.
    """
    folder = choose_path(path, overwrite=overwrite).parent
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        try:
            return _write(temporary, content, path, overwrite=overwrite, named=False)
        except OSError:  # not every file system has files without names, and links to them
            return _write(temporary, content, path, overwrite=overwrite, named=True)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(temporary: Path, content: bytes, path: Path, *, overwrite: bool, named: bool) -> Path:
    with _new_file(temporary, named=named) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if not named:  # it is known by its number, as long as it is open
            source = Path(f"{_OPEN_FILES}/{file.fileno()}")
            return _publish(source, temporary, path, overwrite=overwrite)
    return _publish(temporary, temporary, path, overwrite=overwrite)


def check_writable(path: Path) -> None:
    """Raise now what `write_new` would raise later: the folder takes a file, the name is one."""
    choose_path(path)
    probe = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            _new_file(probe, named=False).close()
        except OSError:
            _new_file(probe, named=True).close()
            probe.unlink()
    except OSError as error:
        raise output_error(path, error) from error


def _new_file(path: Path, *, named: bool) -> BinaryIO:
    """Open a new file for writing, ``path`` or one without a name in its folder; raises OSError.

    A file without a name goes with the process that is killed while it writes: Linux has them.
    """
    if named:
        return path.open("xb")
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        raise OSError(errno.ENOTSUP, "no files without names here")
    return os.fdopen(os.open(path.parent, flag | os.O_WRONLY, 0o666), "wb")


def _publish(source: Path, temporary: Path, path: Path, *, overwrite: bool) -> Path:
    """Give the finished file ``source`` the first free name; return it."""
    for candidate in candidates(path, overwrite=overwrite):
        if overwrite and candidate == path:
            if source != temporary:
                _link(source, temporary)
            temporary.replace(candidate)
            return candidate
        if os.path.lexists(candidate):
            continue
        try:
            _claim(source, candidate)
        except FileExistsError:
            continue  # somebody was faster
        return candidate
    raise _crowded(path)


def _claim(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``; raises FileExistsError instead of replacing a file."""
    if sys.platform == "win32":
        source.rename(target)  # replaces nothing on Windows
        return
    try:
        _link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if source.parent == Path(_OPEN_FILES):
            raise
        # A file system without hard links (exFAT): take the name first, then fill it.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        source.replace(target)


def _link(source: Path, target: Path) -> None:
    if source.parent != Path(_OPEN_FILES):
        os.link(source, target)
        return
    folder = os.open(_OPEN_FILES, os.O_RDONLY)
    try:  # relative to a folder Python follows the link that stands for the file
        os.link(source.name, target, src_dir_fd=folder)
    finally:
        os.close(folder)


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
