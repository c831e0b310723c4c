"""Models that were converted at first use: where they are kept, found again, bounded, removed.

Each is a folder that only this user may write to, named by what the model was made from::

    KEY/entry.json               its name and recipe; the file's time is that of the last use
    KEY/model                    the model folder, once it is complete
    KEY/.model.sdvino-partial    what an interrupted conversion has finished
    KEY/using-*                  locked by each process that runs the model
    .locks/KEY                   locked by the process that converts it
    .lock                        locked for a moment while entries come and go
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import OutputError, SdvinoError
from sdvino.folder.manifest import MANIFEST_FILE
from sdvino.inputs.files import FileLock, is_private, read_json, replace_file, user_path
from sdvino.inputs.shown import parse_size
from sdvino.runtime.cache import default_cache_dir

#: The variables that say where converted models are kept, and how many bytes they may take.
FOLDER_VARIABLE, LIMIT_VARIABLE = "SDVINO_MODELS_DIR", "SDVINO_MODELS_LIMIT"
#: What they may take unless told otherwise: about 15 of Stable Diffusion 1.5 in 8 bits.
DEFAULT_LIMIT = 20 * 10**9
_ENTRY, _MODEL, _USING = "entry.json", "model", "using-"
_LOCKS, _LOCK, _REMOVING = ".locks", ".lock", ".removing-"
_FORMAT = 1
_POLL_SECONDS = 0.3
#: The models that this process runs, each with what it locked to say so.
_in_use: dict[Path, FileLock] = {}


def models_dir() -> Path:
    """Return SDVINO_MODELS_DIR, or `converted` in the folder of sdvino's caches."""
    own = os.environ.get(FOLDER_VARIABLE)
    return (user_path(own) if own else default_cache_dir() / "converted").absolute()


def models_limit() -> int:
    """Return the bytes of SDVINO_MODELS_LIMIT, or 20 GB; raises RequestError for no size."""
    own = os.environ.get(LIMIT_VARIABLE)
    return parse_size(own, LIMIT_VARIABLE) if own else DEFAULT_LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """From what a model was made."""

    #: The file's name without its ending, the folder's, or the hub's id.
    name: str
    #: The recipe's name.
    recipe: str
    #: What the source is known by, whatever it is called.
    source: str
    #: On the hub: owner/name or owner/name/FILE, and the commit that the revision stood for.
    hub: str | None = None
    revision: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A converted model, or what an interrupted conversion has finished of one."""

    #: The entry's folder, called as its key.
    path: Path
    made: Made
    #: When it was last used, in seconds since 1970.
    used: float

    @property
    def model(self) -> Path:
        """Return the model folder, which may be yet to come."""
        return self.path / _MODEL

    @property
    def complete(self) -> bool:
        """Tell whether the model is there: a conversion puts it into place as a whole."""
        return (self.model / MANIFEST_FILE).is_file()

    @property
    def bytes(self) -> int:
        """Return the bytes of everything in the entry."""
        return size_of(self.path)


class ConvertedModels:
    """The entries below ``root``, kept within ``limit`` bytes, the least recently used going first.

    None takes `models_dir` and `models_limit`.
    """

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        self.root = models_dir() if root is None else root
        self.limit = models_limit() if limit is None else limit

    def entry(self, key: str) -> Entry | None:
        """Return the entry ``key``; raises OutputError for one that others could have written."""
        folder = self.root / key
        try:
            if is_private(folder):
                return _read(folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(
                f"{self.root} cannot be read ({error.strerror}); set {FOLDER_VARIABLE} to a folder"
                " that you may write to."
            ) from error
        raise OutputError(
            f"{folder} is in the way: it is no folder, or others than you could have written to"
            f" it; remove it, or set {FOLDER_VARIABLE} to another folder."
        )

    def entries(self) -> list[Entry]:
        """Return every entry of this user's, the least recently used first."""
        try:
            folders = [path for path in self.root.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []
        found = []
        for folder in folders:
            with contextlib.suppress(OSError):  # another process is removing it
                if is_private(folder):
                    found.append(_read(folder))
        return sorted(found, key=lambda entry: entry.used)

    def use(self, entry: Entry) -> bool:
        """Keep others from removing ``entry`` as long as this process lives; tell if it stands."""
        if entry.path not in _in_use:
            # A cache that can be read and not written serves all the same.
            with contextlib.suppress(OSError), self._guard():
                _is_used(entry.path)
                if entry.complete:
                    lock = FileLock(entry.path / f"{_USING}{secrets.token_hex(4)}")
                    lock.acquire(wait=False)
                    _in_use[entry.path] = lock
        with contextlib.suppress(OSError):
            os.utime(entry.path / _ENTRY)
        return entry.complete

    @contextlib.contextmanager
    def converting(self, key: str, made: Made, waiting: Callable[[], None]) -> Iterator[Entry]:
        """Give the entry ``key`` to be converted into, by no other process meanwhile.

        ``waiting`` is called, once, where another process is at it. The entry may be complete by
        then. What is empty afterwards is removed. Raises OutputError where it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.root / _LOCKS).mkdir(exist_ok=True, mode=0o700)
            lock = _wait_for(self.root / _LOCKS / key, waiting)
            with self._guard():
                entry = self.entry(key)
                if entry is None:
                    entry = self._make(key, made)
        except OSError as error:
            raise OutputError(
                f"{self.root} cannot be written ({error.strerror}); set {FOLDER_VARIABLE} to a"
                " folder that you may write to."
            ) from error
        try:
            yield entry
        finally:
            with contextlib.suppress(OSError), self._guard():
                _remove_empty(entry.path)
            lock.release()

    def discard(self, entry: Entry) -> None:
        """Remove the model of an entry that this process converts: it is not what it should be."""
        used = _in_use.pop(entry.path, None)
        if used is not None:
            used.release()
        shutil.rmtree(entry.model, ignore_errors=True)

    def remove(self, entry: Entry) -> int | None:
        """Remove ``entry`` and return the bytes it had; None where it is run or converted.

        Raises OutputError where it cannot be removed.
        """
        try:
            with self._guard():
                if self._is_busy(entry):
                    return None
                size = entry.bytes
                aside = self.root / f"{_REMOVING}{secrets.token_hex(4)}"
                entry.path.rename(aside)
        except OSError as error:
            raise OutputError(
                f"{entry.path} cannot be removed ({error.strerror}); remove the folder yourself."
            ) from error
        shutil.rmtree(aside, ignore_errors=True)
        return size

    def trim(self, keep: Entry) -> list[tuple[Entry, int]]:
        """Remove entries until the rest is within the limit; return them with their bytes.

        The least recently used go first, but neither ``keep`` nor what is run or converted now.
        """
        for left in self.root.glob(f"{_REMOVING}*"):  # by a process that was killed at it
            shutil.rmtree(left, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= self.limit:
                break
            if entry.path == keep.path:
                continue
            with contextlib.suppress(OutputError):
                size = self.remove(entry)
                if size is not None:
                    total -= size
                    removed.append((entry, size))
        return removed

    def _is_busy(self, entry: Entry) -> bool:
        if _is_used(entry.path):
            return True
        (self.root / _LOCKS).mkdir(exist_ok=True, mode=0o700)
        lock = FileLock(self.root / _LOCKS / entry.path.name)
        free = lock.acquire(wait=False)
        lock.release()
        return not free

    def _make(self, key: str, made: Made) -> Entry:
        folder = self.root / key
        folder.mkdir(mode=0o700)
        try:
            text = json.dumps({"format_version": _FORMAT, **asdict(made)}, indent=1)
            replace_file(folder / _ENTRY, text)
            return _read(folder)
        except OSError:
            _remove_empty(folder)
            raise

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        lock = FileLock(self.root / _LOCK)
        lock.acquire(wait=True)
        try:
            yield
        finally:
            lock.release()


def size_of(folder: Path) -> int:
    """Return the bytes of the files in ``folder``; those of links are their targets'."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # another process is removing it
                total += Path(base, name).stat().st_size
    return total


def names_of(entries: Sequence[Entry], taken: Sequence[str] = ()) -> list[str]:
    """Return what the entries are called, each by another name than the others and ``taken``."""
    plain = [f"{entry.made.name}-{entry.made.recipe}" for entry in entries]
    return [
        f"{name}-{entry.path.name[:6]}" if [*plain, *taken].count(name) > 1 else name
        for name, entry in zip(plain, entries, strict=True)
    ]


def _read(folder: Path) -> Entry:
    """Return the entry in ``folder``; what it says of itself is for people alone."""
    path = folder / _ENTRY
    try:
        value: dict[str, Any] = read_json(path, _ENTRY)
        texts = {name: value[name] for name in ("name", "recipe", "source")}
        more = {name: value[name] for name in ("hub", "revision", "commit")}
        if not all(
            isinstance(text, str) for text in (*texts.values(), *filter(None, more.values()))
        ):
            raise ValueError
        return Entry(folder, Made(**texts, **more), path.stat().st_mtime)
    except (SdvinoError, KeyError, ValueError):
        made = Made(name="unknown", recipe="unknown", source="")
        return Entry(folder, made, folder.stat().st_mtime)


def _wait_for(path: Path, waiting: Callable[[], None]) -> FileLock:
    """Return the lock ``path``, taken; looked at again and again, so that Ctrl-C is heard."""
    said = False
    while True:
        lock = FileLock(path)
        if lock.acquire(wait=False):
            return lock
        if not said:
            waiting()
            said = True
        time.sleep(_POLL_SECONDS)


def _is_used(folder: Path) -> bool:
    """Tell whether a process runs the model of an entry; what others left is removed."""
    used = False
    for path in folder.glob(f"{_USING}*"):
        lock = FileLock(path)
        if lock.acquire(wait=False):
            lock.release()
            path.unlink(missing_ok=True)
        else:
            used = True
    return used


def _remove_empty(folder: Path) -> None:
    """Remove an entry that holds neither a model nor any part of one."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {_ENTRY}:
        shutil.rmtree(folder, ignore_errors=True)
