"""Files that somebody else wrote: read within limits, and never from outside their folder."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError

#: Configurations are a few kB; a larger file is something else.
MAX_JSON_BYTES = 4 * 2**20
_CHUNK = 2**20


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in ``path``; ``what`` is the file's name in messages.

    NaN, infinities, other values than an object, and files over `MAX_JSON_BYTES` are refused.
    Raises ModelFolderError.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise ModelFolderError(f"{what} is missing; get the model again.") from error
    except OSError as error:
        raise ModelFolderError(f"{what} cannot be read ({error.strerror}).") from error
    if len(raw) > MAX_JSON_BYTES:
        raise ModelFolderError(f"{what} is over 4 MB, which no such file is; get the model again.")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{what} is not valid JSON; get the model again.") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{what} does not hold a JSON object; get the model again.")
    return value


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is too large")
    return value


def check_inside(path: Path, folder: Path) -> None:
    """Raise ModelFolderError when ``path`` leads out of ``folder`` through a link.

    The hub's cache keeps files as links from ``models--owner--name/snapshots/COMMIT/...`` to
    ``models--owner--name/blobs``: links of that form are allowed.
    """
    real = path.resolve()
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        roots.append((folder.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelFolderError(
            f"{path.relative_to(folder).as_posix()} is a link to a place outside the model folder;"
            " put the file itself there."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file ``path``, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
