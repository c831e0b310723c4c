"""Picture files: PNG, JPEG and WebP that carry their settings, written whole or not at all."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from sdvino.errors import OutputError, RequestError
from sdvino.image.files import check_writable, write_new
from sdvino.image.parameters import MAX_TEXT, parse_parameters, to_text
from sdvino.inputs.files import open_file
from sdvino.request import PictureRecord

#: Extension -> format, by Pillow's name.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: What a picture's metadata is searched in.
_KEY = "parameters"
#: EXIF 2.32 user comments start with eight bytes that name their character code.
_UNICODE = b"UNICODE\0"
_ASCII = b"ASCII\0\0\0"
MAX_FILE_BYTES = 2**30
#: Sides that a format can count, and what one JPEG segment can hold.
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}
MAX_JPEG_EXIF = 65_500


def save_picture(
    pixels: NDArray[np.uint8] | Image.Image,
    path: Path | str,
    record: PictureRecord | None = None,
    *,
    overwrite: bool = False,
    quality: int = 95,
) -> Path:
    """Save a picture, uint8 [H, W, 3] or a PIL picture, and return where it was saved.

    The extension of ``path`` says the format; see
    `sdvino.image.files.choose_path` for ``%03d`` in the name and for
    the number that is added when the file is there and ``overwrite`` is false. ``record`` is
    written into it: a PNG text chunk ``parameters``, elsewhere the EXIF user comment; None writes
    no metadata. ``quality`` (1 to 100) counts for JPEG and WebP.
    The file appears complete or not at all. Raises RequestError for another extension or a record
    that JPEG and WebP cannot hold, OutputError when the file cannot be written.
    """
    path = Path(path)
    kind = picture_format(path)
    picture = pixels if isinstance(pixels, Image.Image) else _as_image(pixels)
    content = _encode(picture, kind, None if record is None else to_text(record), quality)
    return write_new(path, content, overwrite=overwrite)


def picture_format(path: Path) -> str:
    """Return Pillow's name of the format that ``path`` asks for; RequestError for another."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        given = f"ends in {path.suffix}" if path.suffix else "has no extension"
        raise RequestError(
            f"The picture's name {path.name!r} {given}; end it in .png, .jpg or .webp."
        ) from None


def check_output(path: Path | str) -> None:
    """Raise at once what `save_picture` would raise for ``path`` after all the work.

    Raises RequestError for an extension that is no picture's; OutputError when ``path`` is a
    folder, or its folder is not there or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; add the picture's name, such as picture.png.")
    picture_format(path)
    check_writable(path)


def read_record(path: Path | str) -> PictureRecord:
    """Return how a picture was made, as a PNG, JPEG or WebP of sdvino's or A1111's making says.

    Only the metadata is read, never the pixels. Raises RequestError when the file is not there, is
    no picture, is damaged, carries no settings, or says numbers that are none.
    """
    path = Path(path)
    text = _read_text(path)
    if text is None:
        raise RequestError(
            f"{path.name} carries no settings; it was saved without them, or edited since."
        )
    if len(text) > MAX_TEXT:
        raise RequestError(f"The text in {path.name} is too long to be a picture's settings.")
    return parse_parameters(text)


def _as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise RequestError(
            f"Pixels of type {pixels.dtype} and shape {list(pixels.shape)} are no picture;"
            " give uint8 [H, W, 3]."
        )
    return Image.fromarray(pixels)


def _encode(picture: Image.Image, kind: str, text: str | None, quality: int) -> bytes:
    side = MAX_SIDES.get(kind)
    if side is not None and max(picture.size) > side:
        raise RequestError(f"A {kind} file holds {side} pixels a side at most; save a PNG.")
    options: dict[str, Any] = {}
    if kind != "PNG":
        options["quality"] = quality
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    if text is not None and kind == "PNG":
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text(_KEY, text)
        options["pnginfo"] = chunk
    elif text is not None:
        options["exif"] = _exif(text)
        if kind == "JPEG" and len(options["exif"]) > MAX_JPEG_EXIF:
            raise RequestError(
                "The settings are too long for a JPEG; save a PNG, or leave the settings out."
            )
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    comment = _UNICODE + text.encode("utf-16-be")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return exif.tobytes()


def _read_text(path: Path) -> str | None:
    """Return the text of a picture's metadata; None when there is none."""
    try:
        with (
            open_file(path, limit=MAX_FILE_BYTES, error=RequestError, remedy="check it") as file,
            warnings.catch_warnings(),
        ):
            # A large picture is no danger here: its pixels are not read.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
                return _text_of(picture)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{path.name} claims to be absurdly large; it is left alone.") from error
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise RequestError(
            f"{path.name} is not a PNG, JPEG or WebP picture, or it is damaged."
        ) from error


def _text_of(picture: Image.Image) -> str | None:
    text = picture.info.get(_KEY)
    if isinstance(text, str):
        return str(text)
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes) or len(comment) > 4 * MAX_TEXT:
        return None
    return _decode_comment(comment)


def _decode_comment(comment: bytes) -> str | None:
    """Decode an EXIF user comment; UTF-16 in either order, for writers differ."""
    code, body = comment[:8], comment[8:]
    if code == _UNICODE:
        big, little = (body.decode(f"utf-16-{order}", "replace") for order in ("be", "le"))
        # The wrong order turns spaces into U+2000 and letters into CJK: count the plain ones.
        return max(big, little, key=lambda text: sum(c < "\x80" for c in text[:4096]))
    if code == _ASCII or code == b"\0" * 8:
        return body.rstrip(b"\0").decode("utf-8", "replace")
    return None
