"""Text that somebody else wrote, as it may be shown: on a terminal, in a report."""

from __future__ import annotations

import re

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
