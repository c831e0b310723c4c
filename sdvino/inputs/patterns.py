"""Regular expressions that a recipe brings: short ones, which match in little time."""

from __future__ import annotations

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser as _parse  # type: ignore[attr-defined]
else:
    import sre_constants as _codes
    import sre_parse as _parse

_MOST_CHARACTERS = 500
#: Repetitions without an end: each takes up to a name's length, for each place of those before it.
_MOST_REPEATS = 4
_LONG = 100


def compile_pattern(text: str) -> re.Pattern[str] | None:
    """Return ``text`` compiled; None where it is no expression, or one that could run for hours.

    Those repeat what repeats, as in ``(a+)+``, or have many repetitions without an end.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    try:
        if _repeats(_parse.parse(text)) > _MOST_REPEATS:
            return None
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return None


def _repeats(parsed: Any) -> int:
    """Return how many repetitions ``parsed`` holds, `_LONG` where one is within another."""
    count = 0
    for code, arguments in parsed:
        inside = sum(_repeats(part) for part in _parts(arguments))
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT) and arguments[1] > 1:
            count += _LONG if inside else 1
        else:
            count += inside
    return count


def _parts(arguments: Any) -> list[Any]:
    """Return the expressions within the arguments of a code, however they are packed."""
    if isinstance(arguments, _parse.SubPattern):
        return [arguments]
    if isinstance(arguments, (list, tuple)):
        return [part for argument in arguments for part in _parts(argument)]
    return []
