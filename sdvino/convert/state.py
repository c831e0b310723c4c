"""The work folder of a conversion: what is finished, so that a killed one can be continued.

It stands beside the target, as `.NAME.sdvino-partial`, and looks like this::

    state.json     finished steps: the key of what each was made from, its files' SHA-256
    plan.json      what the worker processes are to do
    inputs/        what passes are measured on, one .npz for each component
    passes/        what each pass made of its component
    learning/      what passes that train have done: pictures drawn, checkpoints
    float/         the pipeline in half precision, a model folder but for its manifest
    calibration/   inputs of the components, one .npz each
    model/         the folder that becomes the target
    tmp/           what a step has not finished
    old/           the target that is being replaced, for the moment of the exchange

A step writes into tmp/ and renames; it counts once state.json says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdvino.convert.request import to_plain
from sdvino.convert.staging import check_target, make_parents, remove_empty
from sdvino.errors import OutputError, RequestError, SdvinoError
from sdvino.folder.manifest import MANIFEST_FILE
from sdvino.inputs.files import FileLock, is_private, read_json, sha256_of

STATE_FORMAT = 1
_STATE_FILE = "state.json"
_LOCK_FILE = "lock"
_MAX_STATE_BYTES = 64 * 2**20
_FOLDERS = ("inputs", "passes", "learning", "float", "calibration", "model", "tmp", "logs")

#: Path inside the work folder -> (bytes, SHA-256).
Files = dict[str, tuple[int, str]]


def work_path(target: Path) -> Path:
    """Return where the work folder of ``target`` stands: the same place each time."""
    return target.parent / f".{target.name}.sdvino-partial"


def recorded_steps(target: Path) -> dict[str, str]:
    """Return the steps that an interrupted conversion to ``target`` finished, with their keys.

    Only read: for telling what a conversion would do. Raises as `check_ours` does.
    """
    check_ours(work_path(target))
    steps, _, _ = _read_state(work_path(target))
    return {name: entry["key"] for name, entry in steps.items()}


def check_ours(work: Path) -> None:
    """Raise OutputError unless ``work`` can have been left by an earlier conversion of this user.

    A folder of another user, one that others may write to, and links and odd files in it are not
    ours: they came with an archive, or were put there for us to find.
    """
    if not os.path.lexists(work):
        return
    if not is_private(work) or not work.is_dir():
        raise OutputError(
            f"{work} is in the way: it is no folder, or others than you could have written to it;"
            " remove it, or choose another name."
        )
    for base, folders, files in os.walk(work):
        for name in (*folders, *files):
            told = Path(base, name).lstat()
            if not (stat.S_ISREG(told.st_mode) or stat.S_ISDIR(told.st_mode)):
                raise OutputError(
                    f"{work} holds {name[:80]!r}, a link or another thing that no conversion leaves"
                    " there; remove the folder, or choose another name."
                )


class WorkFolder:
    """The work folder of one target, locked while it is open."""

    def __init__(self, target: Path) -> None:
        """Make the folder, or take what an earlier run left; raises OutputError or RequestError.

        A target that an earlier run was replacing when it was killed is put back first.
        """
        self.target = target
        self.path = work_path(target)
        check_ours(self.path)
        self._made = make_parents(target.parent)
        try:
            # Nobody else may write into it: what is finished is taken on trust.
            self.path.mkdir(exist_ok=True, mode=0o700)
            self._lock = FileLock(self.path / _LOCK_FILE)
        except OSError as error:
            remove_empty(self._made)
            raise OutputError(
                f"{target.parent} cannot be written ({error.strerror}); choose another folder."
            ) from error
        if not self._lock.acquire(wait=False):
            raise RequestError(
                f"Another conversion to {target} is running; wait until it ends, or stop it."
            )
        if self.old.is_dir() and not target.exists():
            self.old.rename(target)
        self._steps, self._gate, self._delivering = _read_state(self.path)

    @property
    def float(self) -> Path:
        """Return the folder of the pipeline in half precision."""
        return self.path / "float"

    @property
    def model(self) -> Path:
        """Return the folder that becomes the target."""
        return self.path / "model"

    @property
    def old(self) -> Path:
        """Return where the replaced target stands while the new one is moved in."""
        return self.path / "old"

    @property
    def has_progress(self) -> bool:
        """Tell whether a step that takes time is finished, so that the folder is worth keeping.

        What a pass has learnt is worth that before it is finished.
        """
        learnt = any((self.path / "learning").glob("*/*"))
        return learnt or any(step != "metadata" for step in self._steps)

    def start_anew(self) -> None:
        """Forget every finished step and remove its files."""
        self._steps, self._gate, self._delivering = {}, None, None
        self._write()
        self._remove_all_but_state()

    def prepare(self) -> None:
        """Remove what unfinished steps left and make the folders."""
        shutil.rmtree(self.path / "tmp", ignore_errors=True)
        for name in _FOLDERS:
            (self.path / name).mkdir(exist_ok=True)

    def finished(self, step: str, key: str) -> bool:
        """Tell whether ``step`` was finished from what ``key`` stands for, and its files stand."""
        entry = self._steps.get(step)
        if entry is None or entry["key"] != key:
            return False
        return all(
            ".." not in name.split("/") and _is_file(self.path / name, size, digest)
            for name, (size, digest) in entry["files"].items()
        )

    def record(self, step: str, key: str, files: Files) -> None:
        """Note that ``step`` is finished."""
        self._steps[step] = {"key": key, "files": {name: list(of) for name, of in files.items()}}
        self._write()

    def forget(self, steps: Sequence[str]) -> None:
        """Note that ``steps`` are to be done again."""
        if any(self._steps.pop(step, None) is not None for step in steps):
            self._write()

    def keep_only(self, steps: Mapping[str, str]) -> list[str]:
        """Forget every step that is not finished under the key given; return those that are."""
        known = len(self._steps)
        kept = [step for step, key in steps.items() if self.finished(step, key)]
        self._steps = {step: self._steps[step] for step in kept}
        if len(kept) != known:
            self._gate = None
            self._write()
        return kept

    def verdict(self, key: str) -> dict[str, Any] | None:
        """Return what the gate recorded for the same request, if it passed already."""
        found = self._gate
        return None if found is None or found["key"] != key else found["value"]

    def record_verdict(self, key: str, value: Mapping[str, Any]) -> None:
        """Note the gate's verdict."""
        self._gate = {"key": key, "value": to_plain(value)}
        self._write()

    def deliver(self, key: str, *, overwrite: bool) -> None:
        """Rename the finished model, made for the request ``key``, to the target; tidy up."""
        check_target(self.target, overwrite=overwrite)
        self._delivering = key
        self._write()
        if self.target.exists():
            self.target.rename(self.old)
        try:
            self.model.rename(self.target)
        except BaseException:
            if self.old.exists():
                self.old.rename(self.target)
            raise
        self.close(remove=True, parents=False)

    def was_delivered(self, key: str) -> bool:
        """Tell whether an earlier run for the same request was killed while it tidied up."""
        moved = self._delivering == key and not self.model.exists()
        return moved and (self.target / MANIFEST_FILE).is_file()

    def close(self, *, remove: bool, parents: bool = True) -> None:
        """Release the folder; ``remove`` it, and with ``parents`` the folders made for it."""
        if remove:
            self._remove_all_but_state()
        self._lock.release()
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
            if parents:
                remove_empty(self._made)

    def _remove_all_but_state(self) -> None:
        """Remove what is large, and nothing that says how far the conversion was."""
        for name in (*_FOLDERS, "old"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _write(self) -> None:
        value = {
            "format_version": STATE_FORMAT,
            "steps": self._steps,
            "gate": self._gate,
            "delivering": self._delivering,
        }
        fresh = self.path / f"{_STATE_FILE}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / _STATE_FILE)


def _read_state(work: Path) -> tuple[dict[str, Any], dict[str, Any] | None, str | None]:
    """Return the finished steps, the gate's verdict and the key of what was being delivered."""
    try:
        value = read_json(work / _STATE_FILE, _STATE_FILE, limit=_MAX_STATE_BYTES)
        if value["format_version"] == STATE_FORMAT:
            steps = {
                str(name): {
                    "key": str(entry["key"]),
                    "files": {file: [int(n), str(d)] for file, (n, d) in entry["files"].items()},
                }
                for name, entry in value["steps"].items()
            }
            return steps, value["gate"], value["delivering"]
    except (SdvinoError, AttributeError, KeyError, TypeError, ValueError):
        pass
    return {}, None, None


def key_of(*parts: Any) -> str:
    """Return a digest of what a step is made from; the parts are what JSON holds."""
    text = json.dumps(to_plain(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_files(folder: Path) -> list[list[Any]]:
    """Return [name, bytes, time of the last change] of what a source at ``folder`` consists of.

    A file describes itself. Enough to notice another file under the same name without reading
    gigabytes, as make does.
    """
    if folder.is_file():
        files = [folder]
        base = folder.parent
    else:
        kinds = (".json", ".safetensors", ".txt", ".xml", ".bin")
        base = folder
        files = sorted(
            path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()
        )
    found = []
    for path in files:
        status = path.stat()
        found.append([path.relative_to(base).as_posix(), status.st_size, status.st_mtime_ns])
    return found


def files_under(path: Path, root: Path) -> Files:
    """Return size and SHA-256 of ``path``, or of everything in it, by its name under ``root``."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        file.relative_to(root).as_posix(): (file.stat().st_size, sha256_of(file)) for file in files
    }


def _is_file(path: Path, size: int, digest: str) -> bool:
    try:
        return path.stat().st_size == size and sha256_of(path) == digest
    except (OSError, SdvinoError):
        return False
