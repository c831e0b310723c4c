"""A target folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdvino.errors import OutputError
from sdvino.folder.manifest import MANIFEST_FILE


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless ``target`` may be written.

    An existing folder must be empty, or a model of ours with ``overwrite``.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} is not a folder; choose another name for the model.")
    standing = next((parent for parent in target.parents if parent.exists()), None)
    if standing is None or not standing.is_dir():
        raise OutputError(f"{target.parent} cannot be made; choose another folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(
                f"{target} is not empty; choose another name, or add --overwrite to replace it."
            )
        if not (target / MANIFEST_FILE).is_file():
            raise OutputError(
                f"{target} was not made by sdvino convert (it has no {MANIFEST_FILE}), so"
                " --overwrite leaves it alone; choose another name."
            )


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that becomes ``target`` when the block ends.

    When the block raises, the temporary folder is removed and ``target`` is as it was.
    Raises OutputError when ``target`` may not, or cannot, be written.
    """
    check_target(target, overwrite=overwrite)
    made = make_parents(target.parent)
    try:
        staging = _sibling(target)
    except OSError as error:
        remove_empty(made)
        raise OutputError(
            f"{target.parent} cannot be written ({error.strerror}); choose another folder."
        ) from error
    try:
        yield staging
        check_target(target, overwrite=overwrite)
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)
        raise


def _replace(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; an old folder there goes only when the new one stands."""
    if not target.exists():
        staging.rename(target)
        return
    old = _sibling(target)
    target.rename(old / "model")
    try:
        staging.rename(target)
    except BaseException:
        (old / "model").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def make_parents(folder: Path) -> list[Path]:
    """Create ``folder`` and return what had to be made, deepest first."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        missing.append(parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(missing)
        raise OutputError(
            f"{folder} cannot be made ({error.strerror}); choose another folder."
        ) from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those of ``folders``, deepest first, that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _sibling(target: Path) -> Path:
    """Make a new hidden folder beside ``target``, with the permissions of any other folder."""
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    return folder
