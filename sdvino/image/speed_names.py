"""`SpeedSettings` as keys of a picture's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from sdvino.errors import RequestError
from sdvino.settings import SpeedSettings

Pairs = Iterable[tuple[str, str]]
_NUMBER = r"[0-9]{1,3}"
_FRACTION = r"(?:[0-9]{1,3}(?:\.[0-9]{1,20})?|[0-9](?:\.[0-9]{1,20})?e-[0-9]{1,2})"
_INTERVAL = re.compile(rf"({_FRACTION}) to ({_FRACTION})")


def speed_pairs(speed: SpeedSettings) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of what differs from the defaults."""
    default = SpeedSettings()
    if speed.guidance_interval is not None:
        start, end = speed.guidance_interval
        yield "Guidance interval", f"{start!r} to {end!r}"
    if speed.guidance_mode is not None:
        yield "Guidance mode", speed.guidance_mode
    for key, name in _INTEGERS.items():
        if getattr(speed, name) != getattr(default, name):
            yield key, str(getattr(speed, name))
    if speed.tiny_vae:
        yield "Tiny VAE", "True"


def parse_speed(pairs: Pairs) -> tuple[SpeedSettings, list[tuple[str, str]]]:
    """Read the settings from the pairs of a picture's text; return the pairs that are not of them.

    Other programs' values under the same keys stay among the rest.
    """
    speed, rest = SpeedSettings(), []
    seen: set[str] = set()
    for key, value in pairs:
        parse = _PARSERS.get(key)
        fields = None if parse is None or key in seen else parse(key, value)
        if fields is not None:
            try:
                speed = replace(speed, **fields)
                seen.add(key)
                continue
            except RequestError:
                pass
        rest.append((key, value))
    return speed, rest


def _integer(key: str, value: str) -> dict[str, Any] | None:
    return {_INTEGERS[key]: int(value)} if re.fullmatch(_NUMBER, value) else None


def _interval(_: str, value: str) -> dict[str, Any] | None:
    found = _INTERVAL.fullmatch(value)
    return None if found is None else {"guidance_interval": (float(found[1]), float(found[2]))}


def _mode(_: str, value: str) -> dict[str, Any]:
    return {"guidance_mode": value}


def _tiny(_: str, value: str) -> dict[str, Any] | None:
    return {"tiny_vae": True} if value == "True" else None


_INTEGERS = {
    "Token downsampling": "token_downsampling",
    "Cache interval": "cache_interval",
    "Cache branch": "cache_branch",
}
_PARSERS: dict[str, Callable[[str, str], dict[str, Any] | None]] = {
    "Guidance interval": _interval,
    "Guidance mode": _mode,
    "Tiny VAE": _tiny,
    **dict.fromkeys(_INTEGERS, _integer),
}
