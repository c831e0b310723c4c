"""JSON and TOML into plain values: bounded numbers, depth and names, each thing said once.

What comes out holds dicts with text keys, lists, text, whole numbers of 64 bits, finite floats,
booleans and None: it can be compared, printed and written again without a surprise.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

#: Levels of lists and objects; a model's configuration has six.
MAX_DEPTH = 64
#: Whole numbers as far as a computer's own go; larger ones become floats, as in JavaScript
#: (transformers writes 1e30 out for a tokenizer without a length).
_MAX_INT = 2**64
_LONG_NUMBER = re.compile(rb"\d{19}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
#: Text and comments of TOML: what in them looks like a name with dots is none.
_TOML_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)


class NotPlain(ValueError):
    """A text is not JSON or TOML, or not within bounds; says why in a few words."""


def parse_json(raw: bytes) -> Any:
    """Return what the JSON text ``raw``, UTF-8, holds; raises NotPlain."""
    # Files of megabytes are read at the speed of C unless something in them wants a closer look.
    long = _LONG_NUMBER.search(raw) is not None
    try:
        value = json.loads(
            _text(raw),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole if long else None,
        )
    except NotPlain:
        raise
    except RecursionError as error:
        raise NotPlain("it is nested too deeply") from error
    except ValueError as error:
        raise NotPlain("it is damaged or cut off") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(raw) is not None:
        _check_text(value)
    return value


def parse_toml(raw: bytes) -> dict[str, Any]:
    """Return what the TOML text ``raw``, UTF-8, holds; raises NotPlain.

    Raises ImportError with Python 3.10 where tomli is not installed.
    """
    # The standard takes CRLF; a lone carriage return is nothing.
    text = _text(raw).replace("\r\n", "\n")
    # Every dot of a name makes the parser keep the whole name before it.
    if any(line.count(".") > MAX_DEPTH for line in _TOML_TEXT.sub("_", text).split("\n")):
        raise NotPlain(f"a line has over {MAX_DEPTH} dots")
    try:
        value = _toml()(text)
    except RecursionError as error:
        raise NotPlain("it is nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is int() of 5,000 digits
        raise NotPlain(str(error)[:200]) from error
    _check_depth(value)
    _check_numbers(value)
    return value


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotPlain("it is not UTF-8 text") from error


def _toml() -> Callable[[str], dict[str, Any]]:
    if sys.version_info >= (3, 11):
        import tomllib as library
    else:
        import tomli as library
    loads: Callable[[str], dict[str, Any]] = library.loads
    return loads


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise NotPlain(f"{name[:80]!r} stands in it twice")
            seen.add(name)
    return found


def _refuse(word: str) -> float:
    raise NotPlain(f"{word} is no number")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise NotPlain("it holds a number that is too large")
    return value


def _whole(word: str) -> int | float:
    if len(word) > 400:  # Python's own limit stops at 4,300 digits, a float's at 309
        raise NotPlain("it holds a number that is too large")
    value = int(word)
    return value if abs(value) < _MAX_INT else _finite(word)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise NotPlain("it is nested too deeply")


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotPlain("it holds text that is no Unicode") from error


def _check_numbers(value: Any) -> None:
    """Raise NotPlain for a number that JSON would not have been allowed, anywhere in ``value``."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, int):
        if abs(value) >= _MAX_INT:
            raise NotPlain("it holds a number that is too large")
    elif isinstance(value, float) and not math.isfinite(value):
        raise NotPlain("it holds a number that is none (nan or inf)")
