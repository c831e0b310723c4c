"""Compiled models kept between runs, in the user's cache folder, within a size.

OpenVINO makes the blob; this file decides where it lies and whether it may be read. Each entry is
a folder with its blob and `checksums.json`: it is written under another name and renamed when
complete, so a second process never sees half of one. A blob that differs from its checksum is
deleted before OpenVINO reads it (a damaged blob can take the process down), and one that somebody
else could have written is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import openvino as ov

from sdvino.errors import RequestError, SdvinoError
from sdvino.inputs.files import FileLock, is_private, read_json, replace_file, sha256_of

_log = logging.getLogger("sdvino")
_CHECKSUMS = "checksums.json"
_TEMPORARY = ".writing-"
_LOCK = ".lock"
#: A folder that is younger may be about to be locked by the process that made it.
_YOUNG_SECONDS = 1.0
#: Bytes of a constant that is a number of an edit rather than weights.
_SMALL_CONSTANT = 64

T = TypeVar("T")
#: Compiles with this CACHE_DIR, or without a cache for None.
Compile = Callable[["Path | None"], T]


def default_cache_dir(
    platform: str = sys.platform,
    environ: Mapping[str, str] | None = None,
    home: Path | None = None,
) -> Path:
    """Return SDVINO_CACHE_DIR, or the folder for sdvino's caches by the rules of the platform.

    XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    Raises RequestError where none of them is known.
    """
    environ = os.environ if environ is None else environ
    own = environ.get("SDVINO_CACHE_DIR")
    if own:
        return Path(own)
    local, xdg = environ.get("LOCALAPPDATA"), environ.get("XDG_CACHE_HOME", "")
    if platform == "win32":
        return (Path(local) if local else _home(home) / "AppData" / "Local") / "sdvino" / "Cache"
    if platform == "darwin":
        return _home(home) / "Library" / "Caches" / "sdvino"
    # The XDG specification says to ignore relative paths.
    return (Path(xdg) if xdg.startswith("/") else _home(home) / ".cache") / "sdvino"


def _home(home: Path | None) -> Path:
    try:
        return Path.home() if home is None else home
    except RuntimeError as error:
        raise RequestError(
            "No home folder is known here, so there is no place for the cache;"
            " set SDVINO_CACHE_DIR to a folder."
        ) from error


def cache_key(*parts: object) -> str:
    """Return a folder name for what ``parts`` say, each by its repr."""
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode()).hexdigest()[:32]


def graph_key(
    model: ov.Model, files: Sequence[str], device: str, properties: Mapping[str, Any]
) -> str:
    """Say which blob this is: what the files hold, the edits as ``model`` shows them, the device.

    OpenVINO's own hash of the graph (constants included) stands behind it, in the file's name.
    """
    ports = [
        (sorted(port.get_names()), str(port.get_partial_shape()), str(port.get_element_type()))
        for port in (*model.inputs, *model.outputs)
    ]
    nodes = [_describe(node) for node in model.get_ordered_ops()]
    described = sorted(properties.items())
    return cache_key(ov.get_version(), list(files), ports, nodes, device, described)


def _describe(node: ov.Node) -> tuple[object, ...]:
    """Return what of ``node`` tells edits apart; names that OpenVINO makes up differ every time."""
    kind = node.get_type_name()
    if kind == "Constant" and node.get_byte_size() <= _SMALL_CONSTANT:
        return kind, bytes(node.get_data().tobytes())
    return kind, node.get_output_size()


class CompiledCache:
    """Entries under ``root``, trimmed to ``limit_bytes``, the least recently used first."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes

    def compile(self, key: str, compile_model: Compile[T]) -> T:
        """Return what ``compile_model`` makes of the entry ``key``, or of a new one.

        A damaged entry is deleted and made again, which the log says. A cache that cannot be
        written costs the cache, not the work.
        """
        _trim_at_start(self.root, self.limit_bytes)
        entry = self.root / key
        if os.path.lexists(entry):
            if entry.is_dir() and not is_private(entry):
                _log.info("A compiled model in the cache is somebody else's; it is not used.")
                return compile_model(None)
            if self._intact(entry):
                before = _files(entry)
                try:
                    result = compile_model(entry)
                except RuntimeError:
                    _log.warning(
                        "A compiled model in the cache cannot be used; compiling it again."
                    )
                else:
                    self._note_use(entry, changed=_files(entry) != before)
                    return result
            else:
                _log.warning("A compiled model in the cache is damaged; compiling it again.")
            _discard(entry)
        return self._compile_new(entry, compile_model)

    def trim(self, keep: Path | None = None) -> None:
        """Delete what crashed processes left, and entries until the rest fits, but not ``keep``."""
        used: list[tuple[float, int, Path]] = []
        try:
            folders = list(self.root.iterdir())
        except OSError:
            return
        for folder in folders:
            try:
                if folder.name.startswith(_TEMPORARY):
                    _remove_left(folder)
                    continue
                age = (folder / _CHECKSUMS).stat().st_mtime
                used.append((age, sum(f.stat().st_size for f in folder.iterdir()), folder))
            except OSError:  # not ours, or another process is deleting it
                continue
        total = sum(size for _, size, _ in used)
        for _, size, folder in sorted(used):
            if total <= self.limit_bytes:
                return
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size

    def _compile_new(self, entry: Path, compile_model: Compile[T]) -> T:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
            lock = FileLock(folder / _LOCK)
        except OSError as error:
            _log.info("The cache folder %s cannot be written (%s).", self.root, error.strerror)
            return compile_model(None)
        try:
            lock.acquire(wait=False)
            try:
                result = compile_model(folder)
            except RuntimeError:
                # The blob could not be written (a full disk), or the model does not compile: the
                # second time without a cache tells which.
                return compile_model(None)
            lock.release()
            self._finish(folder, entry)
            return result
        finally:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, folder: Path, entry: Path) -> None:
        try:
            if any(file.name != _LOCK for file in folder.iterdir()):
                (folder / _LOCK).unlink(missing_ok=True)
                _write_checksums(folder)  # which makes the folder young again
                folder.rename(entry)
                self.trim(keep=entry)
        except OSError as error:  # another process was first, or the disk is full
            _log.debug("The compiled model was not kept: %s", error)

    def _intact(self, entry: Path) -> bool:
        try:
            return bool(read_json(entry / _CHECKSUMS, _CHECKSUMS) == _checksums(entry))
        except (OSError, SdvinoError):
            return False

    def _note_use(self, entry: Path, *, changed: bool) -> None:
        try:
            if changed:  # OpenVINO found the blob outdated and wrote another
                _write_checksums(entry)
            else:
                os.utime(entry / _CHECKSUMS)
        except OSError as error:
            _log.debug("The use of a compiled model was not noted: %s", error)


@functools.cache
def _trim_at_start(root: Path, limit_bytes: int) -> None:
    """Trim the cache once in a process: its limit may be lower than last time."""
    CompiledCache(root, limit_bytes).trim()


def _discard(entry: Path) -> None:
    """Remove ``entry``, or where that fails at least its name, so that another can have it."""
    aside = entry.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        entry.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def _remove_left(folder: Path) -> None:
    """Remove a folder that was being written, unless the process that does is alive."""
    if not folder.is_dir():
        folder.unlink()
    elif time.time() - folder.stat().st_mtime > _YOUNG_SECONDS:
        lock = FileLock(folder / _LOCK)
        if lock.acquire(wait=False):
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return the names, sizes and times of what is in an entry; empty where it cannot be read."""
    try:
        found = [(file.name, file.stat()) for file in folder.iterdir()]
    except OSError:
        return []
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _checksums(folder: Path) -> dict[str, str]:
    return {
        file.name: sha256_of(file)
        for file in folder.iterdir()
        if file.is_file() and file.name not in (_CHECKSUMS, _LOCK)
    }


def _write_checksums(folder: Path) -> None:
    replace_file(folder / _CHECKSUMS, json.dumps(_checksums(folder)))
