"""Sizes in bytes, as people write them and as they are shown; seconds, as they are shown."""

from __future__ import annotations

import re

from sdvino.errors import RequestError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]i?)?b?", re.IGNORECASE)
#: Less is no limit that anything could keep: a number without its unit, most likely.
_LEAST = 10**7


def parse_size(text: str, option: str = "--max-memory") -> int:
    """Return the bytes of a size such as ``3GB``, ``800 MiB`` or ``3000000000``.

    ``option`` is what the size was given to. Raises RequestError for anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0 if found is None else int(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if size < _LEAST:
        raise RequestError(
            f"{option} is {text[:40]!r}; give bytes or a size with its unit, such as 3GB."
        )
    return size


def gigabytes(size: int) -> str:
    """Return ``size`` bytes as people say it, in GB."""
    return f"{size / 1e9:,.1f} GB"


def shown_size(size: float) -> str:
    """Return ``size``, bytes, in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def shown_seconds(seconds: float) -> str:
    """Return about how long ``seconds`` are, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
