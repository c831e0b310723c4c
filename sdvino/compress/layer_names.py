"""Which layers a pass works on: regular expressions over the names of modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdvino.errors import RequestError
from sdvino.inputs.patterns import compile_pattern


def compile_patterns(key: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Return the expressions compiled; raises RequestError for what is none."""
    return [_compile(key, pattern) for pattern in patterns]


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    compiled = compile_pattern(pattern)
    if compiled is None:
        raise RequestError(
            f"{key} has {pattern[:80]!r}, which is no regular expression, or one that repeats too"
            " much; correct it."
        )
    return compiled


def chosen(names: Sequence[str], keep: Sequence[str]) -> list[str]:
    """Return the ``names`` that match nothing in ``keep``, in order.

    Raises RequestError for an expression that matches no name, and when nothing is left.
    """
    left = list(names)
    for pattern in compile_patterns("keep", keep):
        if not any(pattern.search(name) for name in names):
            raise RequestError(
                f"keep has {pattern.pattern!r}, which matches no layer of this component; correct"
                " it or leave it out."
            )
        left = [name for name in left if not pattern.search(name)]
    if not left:
        raise RequestError("keep leaves no layer to work on; leave some of it out.")
    return left
