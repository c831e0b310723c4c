"""A folder of pictures with captions, as datasets' imagefolder has it or with a text file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdvino.errors import RequestError
from sdvino.inputs.files import open_file, read_text
from sdvino.inputs.plain import parse_json

METADATA_FILE = "metadata.jsonl"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: More pictures than this, or longer captions, are refused.
_MOST_PICTURES = 10_000_000
_MOST_CHARACTERS = 2_000
_MOST_METADATA_BYTES = 4 * 2**30
_MOST_LINE_BYTES = 2**20
#: Pictures with more pixels than this are refused before they are decoded.
_MOST_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture and what it shows."""

    path: Path
    caption: str


def find_pictures(folder: Path) -> list[Captioned]:
    """Return the pictures of ``folder``, sorted by name, with their captions.

    A caption stands in NAME.txt beside NAME.png, or in metadata.jsonl, a line
    {"file_name": ..., "text": ...} each. Raises RequestError where pictures or captions are
    missing.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give one with pictures and captions.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise RequestError(f"{folder} holds no pictures (.png, .jpg, .webp); give another folder.")
    if len(files) > _MOST_PICTURES:
        raise RequestError(f"{folder} holds more than {_MOST_PICTURES:,} pictures; give fewer.")
    table = folder / METADATA_FILE
    told = _read_metadata(table) if table.is_file() else {}
    return [Captioned(path, _caption(path, told)) for path in files]


def _caption(path: Path, told: dict[str, str]) -> str:
    caption = told.get(path.name)
    beside = path.with_suffix(".txt")
    if caption is None and beside.is_file():
        caption = read_text(beside, limit=4 * _MOST_CHARACTERS, error=RequestError).strip()
    if caption is None:
        raise RequestError(
            f"{path} has no caption; write it to {beside.name} beside it, or to {METADATA_FILE}."
        )
    if len(caption) > _MOST_CHARACTERS:
        raise RequestError(f"The caption of {path} is over {_MOST_CHARACTERS:,} characters long.")
    return caption


def _read_metadata(path: Path) -> dict[str, str]:
    told: dict[str, str] = {}
    try:
        with open_file(path, limit=_MOST_METADATA_BYTES, error=RequestError) as file:
            while line := file.readline(_MOST_LINE_BYTES):
                if line.strip():
                    row = parse_json(line)
                    name, text = row["file_name"], row["text"]
                    if not (isinstance(name, str) and isinstance(text, str)):
                        raise ValueError("no text")
                    told[name] = text
    except RequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f'{path} is no table of captions; write {{"file_name": ..., "text": ...}} on each line.'
        ) from error
    return told


def load_pictures(entries: Sequence[Captioned], size: tuple[int, int]) -> Any:
    """Return pictures as float32 [n, 3, height, width] in [-1, 1], torch.

    They are scaled to cover ``size`` (height, width) and cut to it in the middle. Raises
    RequestError for a file that is no picture.
    """
    import torch
    from PIL import Image, ImageOps

    rows = []
    for entry in entries:
        try:
            with open_file(entry.path, error=RequestError) as file, Image.open(file) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise RequestError(f"{entry.path} is too large a picture; scale it down.")
                fitted = ImageOps.fit(
                    picture.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS
                )
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{entry.path} is no picture that can be read; remove it."
            ) from error
        rows.append(np.asarray(fitted, np.float32) / np.float32(127.5) - np.float32(1.0))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()
