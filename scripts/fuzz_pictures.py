"""Pictures with odd metadata, for `sdvino info` and `sdvino generate --like`."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from random import Random

from fuzz_draw import Draw, Plan
from fuzz_mutate import NINES, TEXTS, mutate_bytes
from fuzz_templates import DRAW, PARAMETERS
from PIL import ExifTags, Image

_VALUES = (
    *("", "-1", "0", "nan", "1e400", NINES, "18446744073709551615", "77.0", "3,5", "64 x 64"),
    *('"{"', '{"a": [1, 2]}', "[1, 2, [3]]", "Euler a", "Automatic", "\x1b[2J", "a: b, c: d"),
    *("99999x99999", "1x" + NINES, "x" * 5000, "None", "true", '"\\u001b[31m"', "\ud83d"),
)
_WHOLE = (
    "",
    "Steps: 1",
    "{" * 3000,
    '{"prompt": "a", "steps": 20}',
    '{"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}',
    "Steps: " + "1, Steps: " * 5000,
    "a\n" * 50_000 + "Steps: 1, Seed: 1",
    "\x1b]0;owned\x07 Steps: 1, Size: 64x64",
    "\ufeff" + PARAMETERS + "\0",
    PARAMETERS.replace("\n", "\r\n") + "\r\nTemplate: x\r\n",
    ": , " * 20_000,
    '"' * 10_001,
)
_FIELD = re.compile(r"(\w[\w ]*): ([^,\n]+)")
_CODES = (b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8), b"")
_ENCODINGS = ("utf-16-be", "utf-16-le", "utf-16", "utf-8", "latin-1")


def picture(draw: Draw) -> Plan:
    """A picture with settings in one of the places where programs write them."""
    draw.copy(draw.templates.tiny, "model")
    rng = draw.rng
    text = PARAMETERS if draw.healthy else _settings(rng)
    ending = "png" if draw.healthy else rng.choice(("png", "png", "jpg", "webp"))
    content = _png(rng, text, draw.healthy) if ending == "png" else _other(rng, text, ending)
    if draw.chance(0.15):
        content, what = mutate_bytes(rng, content)
        draw.note("picture", what)
    path = draw.write(f"like.{ending}", content)
    if draw.chance(0.1):
        draw.damage(path)
    like = ("generate", "--like", path.name, "-m", "model", *DRAW[:6], "-q", "-o", "drawn.png")
    commands = (like, ("info", path.name), ("info", path.name, "--json"))
    return Plan(commands[0] if draw.healthy else rng.choice(commands), enough=15.0)


def _settings(rng: Random) -> str:
    """Return settings that are wrong somewhere, or that another program would write."""
    if rng.random() < 0.2:
        return rng.choice((*_WHOLE, *TEXTS))
    text = PARAMETERS
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = rng.choice(list(_FIELD.finditer(text)) or [re.search("", text)])
        value = rng.choice(_VALUES)
        new = f"{found[1]}: {value}" if found is not None and found.groups() else value
        place = (0, 0) if found is None else found.span()
        text = text[: place[0]] + new + text[place[1] :]
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(TEXTS) + text[at:]
    return text


def _png(rng: Random, text: str, healthy: bool) -> bytes:
    """Return a PNG with ``text`` in a chunk made here: Pillow writes none that are odd."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    head, tail = buffer.getvalue()[:33], buffer.getvalue()[33:]
    raw = text.encode("utf-8", "surrogatepass")
    latin = text.encode("latin-1", "replace")
    chunks = (
        _chunk(b"iTXt", b"parameters\0\0\0\0\0" + raw),
        _chunk(b"tEXt", b"parameters\0" + latin),
        _chunk(b"tEXt", b"parameters\0" + raw),
        _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(raw)),
        _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(80 * 10**6))),
        _chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(raw)),
        _chunk(b"tEXt", b"Comment\0" + raw) + _chunk(b"tEXt", b"Software\0NovelAI"),
        _chunk(b"tEXt", b"prompt\0" + raw),
        _chunk(b"tEXt", b"parameters\0" + latin) * 300,
    )
    return head + (chunks[0] if healthy else rng.choice(chunks)) + tail


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _other(rng: Random, text: str, ending: str) -> bytes:
    """Return a JPEG or WebP with ``text`` in its EXIF user comment, or a JPEG comment."""
    raw = rng.choice(_CODES) + text.encode(rng.choice(_ENCODINGS), "replace")
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: raw[:60_000]}
    exif[ExifTags.Base.ImageDescription] = text[:2000].encode("utf-8", "replace")
    options = {"exif": exif.tobytes()}
    if ending == "jpg" and rng.random() < 0.3:
        options = {"comment": raw[:60_000]}
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG" if ending == "jpg" else "WEBP", **options)
    return buffer.getvalue()
