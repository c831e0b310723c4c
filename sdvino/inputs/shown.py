"""Text that somebody else wrote, sizes and seconds, as shown; sizes as people type them."""

from __future__ import annotations

import re

from sdvino.errors import RequestError

# Control characters, the two line ends of Unicode, what turns the direction of writing around, and
# halves of surrogate pairs. Joiners within words and emoji stay.
_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_HIDDEN_IN_LINES = re.compile(_HIDDEN.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!~&])")


def one_line(text: object) -> str:
    """Return ``text`` with control characters as escapes, so that it stays one line."""
    text = str(text)
    return text if text.isprintable() else _HIDDEN.sub(_escape, text)


def lines(text: object) -> str:
    """Return ``text`` with control characters as escapes, but for line ends and tabs."""
    return _HIDDEN_IN_LINES.sub(_escape, str(text))


def shortened(text: str, most: int = 1000) -> str:
    """Return ``text`` with its middle left out where it has over ``most`` characters."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]} [...] {text[-end:]}"


def markdown(text: object) -> str:
    """Return ``text`` as Markdown that shows it and nothing else, on one line."""
    return _MARKDOWN.sub(r"\\\1", one_line(" ".join(str(text).split())))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


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
