"""The text a picture carries, as AUTOMATIC1111 writes it, so that many programs read it.

    a red circle
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512, Version: sdvino 0.1.0

Values that hold a comma, a colon or a line end are JSON strings, as there. What that form cannot
hold exactly (a prompt with a line "Negative prompt: ...", say) is repeated in a key of our own.
The keys of the options stand beside them, in `sdvino.request.OPTIONS`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from sdvino.errors import RequestError
from sdvino.inputs.fields import Choice, squeeze
from sdvino.request import DEFAULTS, OPTIONS, PictureRecord, Request

#: Longest text that is read: prompts have at most some ten thousand characters.
MAX_TEXT = 2**20
_NEGATIVE = "Negative prompt:"
#: Both prompts as a list of JSON, null where there is no negative one.
_EXACT = "Exact prompts"
_SIZE = re.compile(r"(?P<width>[0-9]{1,6})x(?P<height>[0-9]{1,6})")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ \-/+()]{0,63}")
#: A1111's keys stand in its order; the others follow.
_FIRST = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Clip skip"),
    *("RNG", "Eta", "Timestep spacing", "Guidance rescale", "Recipe"),
)
#: Key -> the option's name; what is no value of an A1111 key of a number is damaged.
_A1111 = {one.a1111: name for name, one in OPTIONS.items() if one.a1111 is not None}
_OURS = {one.key: name for name, one in OPTIONS.items() if one.key is not None}
#: Key -> the field of a record; the last two are the prompts as sdvino once repeated them.
_TEXTS = {
    "Model": "model",
    "Recipe": "recipe",
    "Version": "version",
    "Exact prompt": "prompt",
    "Exact negative prompt": "negative_prompt",
}


def to_text(record: PictureRecord) -> str:
    """Return the text that a picture carries; `parse_parameters` reads it back."""
    text = _text(record)
    try:
        if parse_parameters(text) == record:
            return text
    except RequestError:
        pass  # another program's value under a key that is ours
    return _text(record, exact=True)


def _text(record: PictureRecord, *, exact: bool = False) -> str:
    (prompt,), (negative,) = record.request.prompts, record.request.negative_prompts
    pairs = list(_pairs(record))
    if exact:
        pairs.append((_EXACT, json.dumps([prompt, negative])))
    last = ", ".join(f"{key}: {_quote(key, value)}" for key, value in pairs)
    lines = [_printable(prompt), last]
    if negative is not None:
        lines.insert(1, f"{_NEGATIVE} {_printable(negative)}")
    return "\n".join(lines)


def _pairs(record: PictureRecord) -> Iterator[tuple[str, str]]:
    """Yield the keys of the last line in A1111's order, then ours, then the others'."""
    values = record.request.flat()
    known: dict[str, str | None] = {"Model": record.model, "Recipe": record.recipe}
    if values["width"] is not None and values["height"] is not None:
        known["Size"] = f"{values['width']}x{values['height']}"
    for key, name in (_A1111 | _OURS).items():
        if OPTIONS[name].always or values[name] != DEFAULTS[name]:
            known[key] = OPTIONS[name].kind.write(values[name])
    ordered = {key: known.pop(key) for key in _FIRST if key in known}
    for key, value in [
        *ordered.items(),
        *known.items(),
        *record.other,
        ("Version", record.version),
    ]:
        if value is not None:
            yield key, value


def parse_parameters(text: str) -> PictureRecord:
    """Read how a picture was made from its text, in the form of A1111.

    A sampler that sdvino does not have stays among `PictureRecord.other`, under ``Sampler``.
    Raises RequestError when the text is too long, or says a number or a prompt that is none.
    """
    if len(text) > MAX_TEXT:
        raise RequestError(
            f"The picture's text has {len(text):,} characters; it is no picture's settings."
        )
    body, _, last = text.rpartition("\n")
    pairs = _split_pairs(last)
    if not _are_parameters(pairs):
        body, pairs = text, []
    return _from_pairs(*_split_prompts(body), pairs)


def _are_parameters(pairs: list[tuple[str, str]]) -> bool:
    """Return whether these come from a line of parameters and not from a prompt's last line."""
    return len(pairs) >= 3 or any(
        key == "Version" and value.startswith("sdvino") for key, value in pairs
    )


def _split_prompts(body: str) -> tuple[str, str | None]:
    lines = body.split("\n")
    for i, line in enumerate(lines):
        if line.startswith(_NEGATIVE):
            first = line[len(_NEGATIVE) :].removeprefix(" ")
            return "\n".join(lines[:i]), "\n".join([first, *lines[i + 1 :]])
    return body, None


def _split_pairs(line: str) -> list[tuple[str, str]]:
    """Split ``Key: value, Key: "quoted, value"``; an empty list when ``line`` is no such thing."""
    pairs: list[tuple[str, str]] = []
    decode = json.JSONDecoder().raw_decode
    position = 0
    while position < len(line):
        colon = line.find(":", position, position + 80)
        key = line[position:colon].strip() if colon >= 0 else ""
        if _KEY.fullmatch(key) is None:
            return []
        start = colon + 1
        while start < len(line) and line[start] == " ":
            start += 1
        if line[start : start + 1] == '"':
            try:
                value, end = decode(line, start)
            except (ValueError, RecursionError):
                return []
            if end < len(line) and line[end] != ",":
                return []
        else:
            end = line.find(",", start)
            end = len(line) if end < 0 else end
            value = line[start:end].strip()
        pairs.append((key, value))
        position = end + 1
    return pairs


def _from_pairs(prompt: str, negative: str | None, pairs: list[tuple[str, str]]) -> PictureRecord:
    found: dict[str, Any] = {}
    other: list[tuple[str, str]] = []
    for key, value in pairs:
        fields = _fields(key, value)
        if fields is None or found.keys() & (fields.keys() - {"sigma_schedule"}):
            other.append((key, value))
        else:
            # "DPM++ 2M Karras" says a schedule too, but a key of its own says it better.
            found = {**fields, **found} if key == "Sampler" else {**found, **fields}
    foreign = found.keys() - _OURS.values()
    if foreign and "noise" not in found and not str(found.get("version", "")).startswith("sdvino"):
        # A1111 names its source of random numbers only when it is not the GPU.
        found["noise"] = "cuda"
    about = {name: found.pop(name, None) for name in ("model", "recipe", "version")}
    prompt, negative = found.pop("prompt", prompt), found.pop("negative_prompt", negative)
    request = Request.of(prompts=(prompt,), negative_prompts=(negative,), **found)
    return PictureRecord(request=request, **about, other=tuple(other))


def _fields(key: str, value: str) -> dict[str, Any] | None:
    """Return the fields that one pair sets, or None when it is for others."""
    if key in _TEXTS:
        # An empty text in the last of them stood for no negative prompt.
        return {_TEXTS[key]: None if _TEXTS[key] == "negative_prompt" and not value else value}
    if key == _EXACT:
        return _exact(value)
    if key == "Size":
        match = _SIZE.fullmatch(value)
        if match is None:
            raise _bad(key, value)
        return {name: _number(key, name, match[name]) for name in ("width", "height")}
    if key == "Sampler":
        return parse_sampler(value)
    if key in _A1111 and not isinstance(OPTIONS[_A1111[key]].kind, Choice):
        return {_A1111[key]: _number(key, _A1111[key], value)}
    name = {**_A1111, **_OURS}.get(key)
    if name is not None:
        with contextlib.suppress(ValueError):
            return {name: _taken(name, value)}
    return None


def _taken(name: str, text: str) -> Any:
    kind = OPTIONS[name].kind
    return kind.take(name, kind.read(text))


def _number(key: str, name: str, text: str) -> Any:
    try:
        return _taken(name, text)
    except ValueError:
        raise _bad(key, text) from None


def _exact(value: str) -> dict[str, Any] | None:
    try:
        prompt, negative = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None
    if not isinstance(prompt, str) or not isinstance(negative, (str, type(None))):
        return None
    return {"prompt": prompt, "negative_prompt": negative}


def parse_sampler(text: str) -> dict[str, Any] | None:
    """Return the settings a sampler's name stands for, by field; None for an unknown one.

    A1111 before 1.9 put the schedule into it: "DPM++ 2M Karras".
    """
    spelled = squeeze(text).removesuffix("scheduler")
    for schedule in ("", "karras", "exponential"):
        if spelled.endswith(schedule):
            with contextlib.suppress(ValueError):
                name = OPTIONS["scheduler"].kind.read(spelled.removesuffix(schedule))
                return {"scheduler": name, **({"sigma_schedule": schedule} if schedule else {})}
    return None


def _bad(key: str, value: str) -> RequestError:
    shown = value if len(value) <= 40 else f"{value[:40]}..."
    return RequestError(
        f"The picture's settings say {key}: {shown!r}, which is no such number;"
        " give the settings yourself instead of --like."
    )


def _quote(key: str, value: str) -> str:
    """Quote as A1111 does where the value would not be read back; in ASCII where it must be."""
    if key == _EXACT or value != _printable(value):
        return json.dumps(value)
    awkward = any(character in value for character in ',:\n"') or value != value.strip()
    return json.dumps(value, ensure_ascii=False) if awkward else value


def _printable(text: str) -> str:
    """Return ``text`` without what a text chunk cannot carry: controls and half surrogate pairs."""
    return "".join(
        c
        for c in text
        if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f" and not "\ud800" <= c <= "\udfff")
    )
