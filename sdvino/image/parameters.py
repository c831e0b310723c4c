"""The settings a picture carries, as AUTOMATIC1111 writes them, so that many programs read them.

    a red circle
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512, Version: sdvino 0.1.0

Values that hold a comma, a colon or a line end are JSON strings, as there. What that form cannot
hold exactly (a prompt with a line "Negative prompt: ...", say) is repeated in a key of our own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from sdvino import __version__
from sdvino.errors import RequestError
from sdvino.image.sampler_names import (
    SCHEDULE_TITLES,
    parse_sampler,
    parse_schedule,
    sampler_title,
)
from sdvino.image.speed_names import parse_speed, speed_pairs
from sdvino.settings import (
    MAX_SEED,
    MIN_SEED,
    NoiseName,
    SamplerName,
    SigmaScheduleName,
    SpeedSettings,
    TimestepSpacing,
)

#: Longest text that is read: prompts have at most some ten thousand characters.
MAX_TEXT = 2**20
_NEGATIVE = "Negative prompt:"
_EXACT_PROMPT = "Exact prompt"
_EXACT_NEGATIVE = "Exact negative prompt"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ \-/+()]{0,63}")
#: A1111's name for whose random numbers are used, and ours. Its own default is the GPU's.
_NOISES: dict[str, NoiseName] = {"cpu": "torch", "gpu": "cuda", "nv": "cuda", "cuda": "cuda"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSettings:
    """How a picture was made. None is what its maker did not say."""

    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    scheduler: SamplerName | None = None
    sigma_schedule: SigmaScheduleName | None = None
    timestep_spacing: TimestepSpacing | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float | None = None
    seed: int | None = None
    noise: NoiseName | None = None
    width: int | None = None
    height: int | None = None
    #: Layers left out of the text encoder, as diffusers counts (A1111's number is one more).
    clip_skip: int | None = None
    #: What made the picture sooner; only what differs from the defaults is written.
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    #: Name of the model, never where it lies: folders before it are cut off.
    model: str | None = None
    #: How the model was compressed.
    recipe: str | None = None
    #: Program and version that made the picture.
    version: str | None = f"sdvino {__version__}"
    #: What else stands in the text, in its order: other programs' keys.
    other: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.model is not None:
            name = re.split(r"[/\\]", self.model.rstrip("/\\"))[-1]
            object.__setattr__(self, "model", name)

    def to_text(self) -> str:
        """Return the text that a picture carries; `parse_parameters` reads it back."""
        text = self._text()
        try:
            if parse_parameters(text) == self:
                return text
        except RequestError:
            pass  # such as a prompt too long to be read again; say so when reading
        return self._text(exact=True)

    def _text(self, *, exact: bool = False) -> str:
        pairs = list(self._pairs())
        if exact:
            pairs += [(_EXACT_PROMPT, self.prompt), (_EXACT_NEGATIVE, self.negative_prompt)]
        last = ", ".join(f"{key}: {_quote(key, value)}" for key, value in pairs)
        lines = [_printable(self.prompt), last]
        if self.negative_prompt:
            lines.insert(1, f"{_NEGATIVE} {_printable(self.negative_prompt)}")
        return "\n".join(lines)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of the last line in A1111's order, then ours, then the others'."""
        schedule = self.sigma_schedule
        size = None if self.width is None or self.height is None else (self.width, self.height)
        known: list[tuple[str, object]] = [
            ("Steps", self.num_inference_steps),
            ("Sampler", None if self.scheduler is None else sampler_title(self.scheduler)),
            ("Schedule type", None if schedule is None else SCHEDULE_TITLES[schedule]),
            ("CFG scale", self.guidance_scale),
            ("Seed", self.seed),
            ("Size", None if size is None else f"{size[0]}x{size[1]}"),
            ("Model", self.model),
            ("Clip skip", None if self.clip_skip is None else self.clip_skip + 1),
            ("RNG", {"torch": "CPU", "cuda": "GPU", None: None}[self.noise]),
            ("Eta", self.eta),
            ("Timestep spacing", self.timestep_spacing),
            ("Guidance rescale", self.guidance_rescale),
            ("Recipe", self.recipe),
            *speed_pairs(self.speed),
            *self.other,
            ("Version", self.version),
        ]
        for key, value in known:
            if value is not None:
                yield key, _number(value) if isinstance(value, float) else str(value)


def parse_parameters(text: str) -> PictureSettings:
    """Read the settings from the text of a picture, in the form of A1111.

    A sampler that sdvino does not have stays among `PictureSettings.other`, under ``Sampler``.
    Raises RequestError when the text is too long or a number in it is none.
    """
    if len(text) > MAX_TEXT:
        raise RequestError(
            f"The picture's text has {len(text):,} characters; it is no picture's settings."
        )
    body, _, last = text.rpartition("\n")
    pairs = _split_pairs(last)
    if not _are_parameters(pairs):
        body, pairs = text, []
    prompt, negative = _split_prompts(body)
    return _from_pairs(
        PictureSettings(prompt=prompt, negative_prompt=negative, version=None), pairs
    )


def _are_parameters(pairs: list[tuple[str, str]]) -> bool:
    """Return whether these come from a line of parameters and not from a prompt's last line."""
    return len(pairs) >= 3 or any(
        key == "Version" and value.startswith("sdvino") for key, value in pairs
    )


def _split_prompts(body: str) -> tuple[str, str]:
    lines = body.split("\n")
    for i, line in enumerate(lines):
        if line.startswith(_NEGATIVE):
            first = line[len(_NEGATIVE) :].removeprefix(" ")
            return "\n".join(lines[:i]), "\n".join([first, *lines[i + 1 :]])
    return body, ""


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


def _from_pairs(settings: PictureSettings, pairs: list[tuple[str, str]]) -> PictureSettings:
    found: dict[str, Any] = {}
    speed, pairs = parse_speed(pairs)
    other: list[tuple[str, str]] = []
    for key, value in pairs:
        fields = _fields(key, value)
        if fields is None or found.keys() & fields.keys() - {"sigma_schedule"}:
            other.append((key, value))
        else:
            # "DPM++ 2M Karras" says a schedule too, but a key of its own says it better.
            found = {**fields, **found} if key == "Sampler" else {**found, **fields}
    if found and "noise" not in found and not str(found.get("version", "")).startswith("sdvino"):
        # A1111 names its source of random numbers only when it is not the GPU.
        found["noise"] = "cuda"
    return replace(settings, **found, speed=speed, other=tuple(other))


def _fields(key: str, value: str) -> dict[str, Any] | None:
    """Return the fields that one pair sets, or None when it is for others."""
    if key in _TEXTS:
        return {_TEXTS[key]: value}
    if key in _INTEGERS:
        name, low, high = _INTEGERS[key]
        number = _integer(key, value, low, high)
        return {name: number - 1 if name == "clip_skip" else number}
    if key in _FLOATS:
        return {_FLOATS[key]: _float(key, value)}
    if key == "Size":
        match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value)
        if match is None:
            raise _bad(key, value)
        return {"width": int(match[1]), "height": int(match[2])}
    if key == "Sampler":
        return parse_sampler(value)
    if key == "Schedule type":
        schedule = parse_schedule(value)
        return None if schedule is None else {"sigma_schedule": schedule}
    if key == "RNG" and value.lower() in _NOISES:
        return {"noise": _NOISES[value.lower()]}
    if key == "Timestep spacing" and value in get_args(TimestepSpacing):
        return {"timestep_spacing": value}
    return None


_TEXTS = {
    "Model": "model",
    "Recipe": "recipe",
    "Version": "version",
    _EXACT_PROMPT: "prompt",
    _EXACT_NEGATIVE: "negative_prompt",
}
_INTEGERS = {
    "Steps": ("num_inference_steps", 0, 10**6),
    "Seed": ("seed", MIN_SEED, MAX_SEED),
    "Clip skip": ("clip_skip", 1, 1000),
}
_FLOATS = {
    "CFG scale": "guidance_scale",
    "Guidance rescale": "guidance_rescale",
    "Eta": "eta",
}


def _integer(key: str, value: str, low: int, high: int) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,20}", value) is None or not low <= int(value) <= high:
        raise _bad(key, value)
    return int(value)


def _float(key: str, value: str) -> float:
    try:
        number = float(value) if len(value) < 64 else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _bad(key, value)
    return number


def _bad(key: str, value: str) -> RequestError:
    shown = value if len(value) <= 40 else f"{value[:40]}..."
    return RequestError(
        f"The picture's settings say {key}: {shown!r}, which is no such number;"
        " give the settings yourself instead of --like."
    )


def _number(value: float) -> str:
    """Return the shortest text of ``value``: 7, not 7.0."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(float(value))


def _quote(key: str, value: str) -> str:
    """Quote as A1111 does where the value would not be read back; in ASCII where it must be."""
    if key in (_EXACT_PROMPT, _EXACT_NEGATIVE) or value != _printable(value):
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
