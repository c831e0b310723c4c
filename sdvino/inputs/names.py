"""Names of files as people and files give them."""

from __future__ import annotations

from pathlib import Path

from sdvino.errors import RequestError


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
