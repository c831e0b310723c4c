"""What a field of the settings takes, and how it is said outside Python: written once, beside it.

A dataclass's field made by `option` has an `Option`: `take_fields` checks what the field is given,
the command line makes an option of it, and a picture's text has a key for it.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from sdvino.errors import RequestError
from sdvino.inputs.shown import shortened

_FRACTION = r"(?:[0-9]{1,3}(?:\.[0-9]{1,20})?|[0-9](?:\.[0-9]{1,20})?e-[0-9]{1,3})"
_INTERVAL = re.compile(rf"({_FRACTION}) to ({_FRACTION})")
_SWITCH = {"True": True, "False": False, "None": None}
#: Longest name of a choice that is looked up.
_MAX_NAME = 64


class Kind(ABC):
    """The values that a field takes; None is left to the field."""

    @abstractmethod
    def take(self, name: str, value: Any) -> Any:
        """Return ``value`` in the type of the field ``name``; raises RequestError naming it."""

    def read(self, text: str) -> Any:
        """Return what a picture's text says, to be taken; raises ValueError where it is nothing."""
        raise ValueError(text)  # of a kind that no picture carries

    def write(self, value: Any) -> str:
        """Return the value as a picture's text says it."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Whole(Kind):
    """A whole number from ``low`` to ``high``; in a picture's text it is ``shift`` more."""

    low: int
    high: int
    shift: int = 0

    def take(self, name: str, value: Any) -> int:
        """Return an int."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise RequestError(f"{name} is {_shown(value)}; give a whole number.")
        if not self.low <= int(value) <= self.high:
            raise RequestError(
                f"{name} is {_shown(int(value))};"
                f" give a whole number from {self.low} to {self.high}."
            )
        return int(value)

    def read(self, text: str) -> int:
        """Read digits, and nothing longer than 64 bits take."""
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text) is None:
            raise ValueError(text)
        return int(text) - self.shift

    def write(self, value: int) -> str:
        """Write digits."""
        return str(value + self.shift)


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A number from ``low`` to ``high``."""

    low: float
    high: float

    def take(self, name: str, value: Any) -> float:
        """Return a float."""
        if not (_is_number(value) and self.low <= value <= self.high):
            raise RequestError(
                f"{name} is {_shown(value)}; give a number from {self.low:g} to {self.high:g}."
            )
        return float(value)

    def read(self, text: str) -> float:
        """Read a finite number."""
        number = float(text) if len(text) < 64 else math.nan
        if not math.isfinite(number):
            raise ValueError(text)
        return number

    def write(self, value: float) -> str:
        """Write the shortest text: 7, not 7.0."""
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of a few names, or of a few whole numbers."""

    names: tuple[Any, ...]
    #: Name -> how a picture's text says it, where that is another.
    titles: Mapping[Any, str] = field(default_factory=dict)
    #: What else is read -> the name; letters and digits alone, in small letters.
    aliases: Mapping[str, Any] = field(default_factory=dict)

    def take(self, name: str, value: Any) -> Any:
        """Return the name."""
        if not isinstance(value, (str, int)) or value not in self.names:
            known = ", ".join(str(one) for one in self.names)
            raise RequestError(
                f"Unknown {name.replace('_', ' ')} {_shown(value)}; choose one of: {known}."
            )
        return self.names[self.names.index(value)]

    def read(self, text: str) -> Any:
        """Read a name, a title or an alias, however it is spaced and capitalized."""
        if len(text) <= _MAX_NAME:
            spelled = squeeze(text)
            for one in self.names:
                if spelled in (squeeze(str(one)), squeeze(self.write(one))):
                    return one
            if spelled in self.aliases:
                return self.aliases[spelled]
        raise ValueError(text)

    def write(self, value: Any) -> str:
        """Write the title."""
        return self.titles.get(value, str(value))


@dataclass(frozen=True, slots=True)
class Interval(Kind):
    """Two fractions of the steps, the smaller first."""

    def take(self, name: str, value: Any) -> tuple[float, float]:
        """Return a pair of floats."""
        what = f"The {name.replace('_', ' ')}"
        try:
            start, end = value
        except (TypeError, ValueError):
            raise RequestError(f"{what} takes two fractions, such as (0.1, 0.8).") from None
        if not (_is_number(start) and _is_number(end) and 0.0 <= start < end <= 1.0):
            raise RequestError(
                f"{what} is {_shown(start)} to {_shown(end)}; give two fractions of the steps from"
                " 0 to 1, the smaller first."
            )
        return float(start), float(end)

    def read(self, text: str) -> tuple[float, float]:
        """Read ``0.1 to 0.8``."""
        found = _INTERVAL.fullmatch(text)
        if found is None:
            raise ValueError(text)
        return float(found[1]), float(found[2])

    def write(self, value: tuple[float, float]) -> str:
        """Write ``0.1 to 0.8``."""
        return f"{value[0]!r} to {value[1]!r}"


@dataclass(frozen=True, slots=True)
class Switch(Kind):
    """Yes, no, or None: whoever runs it decides."""

    def take(self, name: str, value: Any) -> bool | None:
        """Return a bool or None."""
        if not isinstance(value, (bool, type(None))):
            raise RequestError(f"{name} is {_shown(value)}; give true or false.")
        return value

    def read(self, text: str) -> bool | None:
        """Read ``True``, ``False`` or ``None``."""
        if text not in _SWITCH:
            raise ValueError(text)
        return _SWITCH[text]


@dataclass(frozen=True, slots=True)
class Folder(Kind):
    """A folder of this machine, which no picture's text says."""

    def take(self, name: str, value: Any) -> Path:
        """Return a path."""
        return Path(value)


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is said outside Python."""

    kind: Kind
    #: For the command line; '' keeps the field from it.
    help: str = ""
    #: Its spellings there; none is the field's name with dashes.
    flags: tuple[str, ...] = ()
    #: AUTOMATIC1111's key in a picture's text, of which sdvino reads what A1111 writes.
    a1111: str | None = None
    #: Our own key there; other programs may mean something else by it.
    key: str | None = None
    #: Write it there also where it is the default, for other programs have another.
    always: bool = False


def option(
    kind: Kind,
    help: str = "",
    *flags: str,
    a1111: str | None = None,
    key: str | None = None,
    always: bool = False,
    default: Any = None,
) -> Any:
    """Return a dataclass's field with its `Option`."""
    metadata = {"option": Option(kind, help, flags, a1111, key, always)}
    return field(default=default, metadata=metadata)


def options_of(settings: Any) -> dict[str, Option]:
    """Return the options of a dataclass (the class or one of it), by the fields' names."""
    return {
        one.name: one.metadata["option"] for one in fields(settings) if "option" in one.metadata
    }


def take_fields(settings: Any) -> None:
    """Bring the fields of a dataclass into their types; raises RequestError for a wrong value."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        if "option" in one.metadata and not (value is None and one.default is None):
            taken = one.metadata["option"].kind.take(one.name, value)
            object.__setattr__(settings, one.name, taken)


def squeeze(name: str) -> str:
    """Return a name as all its spellings have it: small letters and digits, ++ as pp."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    try:
        return shortened(repr(value), 80)
    except ValueError:  # Python writes no whole number of over 4,300 digits
        return "a huge number"
