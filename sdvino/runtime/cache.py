"""Compiled models kept between runs, in the user's cache folder, within a size.

OpenVINO makes the blob; this file decides where it lies and whether it may be read. Each entry is
a folder with its blob and `checksums.json`: it is written under another name and renamed when
complete, so a second process never sees half of one, and a blob that differs from its checksum is
deleted before OpenVINO reads it (a damaged blob can take the process down).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import openvino as ov

from sdvino.files import sha256_of

_log = logging.getLogger("sdvino")
_CHECKSUMS = "checksums.json"
_TEMPORARY = ".writing-"
#: What a crashed process left behind is removed after a day.
_STALE_SECONDS = 86400.0
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
    """
    environ = os.environ if environ is None else environ
    own = environ.get("SDVINO_CACHE_DIR")
    if own:
        return Path(own)
    home = Path.home() if home is None else home
    if platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "sdvino" / "Cache"
    if platform == "darwin":
        return home / "Library" / "Caches" / "sdvino"
    xdg = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(xdg) if xdg.startswith("/") else home / ".cache") / "sdvino"


def cache_key(*parts: object) -> str:
    """Return a folder name for what ``parts`` say, each by its repr."""
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode()).hexdigest()[:32]


def graph_key(model: ov.Model, xml_path: Path, device: str, properties: Mapping[str, Any]) -> str:
    """Say which blob this is: the files, the edits as ``model`` shows them, the device.

    OpenVINO's own hash of the graph (constants included) stands behind it, in the file's name.
    """
    ports = [
        (sorted(port.get_names()), str(port.get_partial_shape()), str(port.get_element_type()))
        for port in (*model.inputs, *model.outputs)
    ]
    nodes = [_describe(node) for node in model.get_ordered_ops()]
    described = sorted(properties.items())
    files = described_files(xml_path)
    return cache_key(ov.get_version(), files, ports, nodes, device, described)


def described_files(xml_path: Path) -> list[object]:
    """Return which files of a graph these are: where, and for XML and weights size and time."""
    files = [path.stat() for path in (xml_path, xml_path.with_suffix(".bin"))]
    return [str(xml_path.resolve()), *((stat.st_size, stat.st_mtime_ns) for stat in files)]


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
        entry = self.root / key
        if entry.is_dir():
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
            shutil.rmtree(entry, ignore_errors=True)
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
                    if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                        shutil.rmtree(folder, ignore_errors=True)
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
            self.root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
        except OSError as error:
            _log.info("The cache folder %s cannot be written (%s).", self.root, error.strerror)
            return compile_model(None)
        try:
            try:
                result = compile_model(folder)
            except RuntimeError:
                # The blob could not be written (a full disk), or the model does not compile: the
                # second time without a cache tells which.
                return compile_model(None)
            self._finish(folder, entry)
            return result
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, folder: Path, entry: Path) -> None:
        try:
            if any(folder.iterdir()):
                _write_checksums(folder)
                folder.rename(entry)
                self.trim(keep=entry)
        except OSError as error:  # another process was first, or the disk is full
            _log.debug("The compiled model was not kept: %s", error)

    def _intact(self, entry: Path) -> bool:
        try:
            listed = json.loads((entry / _CHECKSUMS).read_text(encoding="utf-8"))
            return bool(listed == _checksums(entry))
        except (OSError, ValueError):
            return False

    def _note_use(self, entry: Path, *, changed: bool) -> None:
        try:
            if changed:  # OpenVINO found the blob outdated and wrote another
                _write_checksums(entry)
            else:
                os.utime(entry / _CHECKSUMS)
        except OSError as error:
            _log.debug("The use of a compiled model was not noted: %s", error)


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
        if file.is_file() and not file.name.startswith(_CHECKSUMS)
    }


def _write_checksums(folder: Path) -> None:
    temporary = folder / f"{_CHECKSUMS}.{os.getpid()}"
    temporary.write_text(json.dumps(_checksums(folder)), encoding="utf-8")
    temporary.replace(folder / _CHECKSUMS)
