from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdvino.errors import OutputError, RequestError
from sdvino.image.parameters import MAX_TEXT, to_text
from sdvino.image.picture import check_output, picture_format, read_record, save_picture
from sdvino.request import PictureRecord, Request

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
MADE = PictureRecord(
    request=Request.of(
        prompts=['a "red" circle: été 🦊\nNegative prompt: not this'],
        negative_prompts=["blurry,\nИ"],
        num_inference_steps=4,
        scheduler="dpmpp_2m",
        guidance_scale=7.0,
        seed=-1,
        width=40,
        height=24,
    )
)
EXTENSIONS = [".png", ".jpg", ".JPEG", ".webp"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_pictures_carry_their_settings(tmp_path: Path, extension: str) -> None:
    path = save_picture(PIXELS, tmp_path / f"circle{extension}", MADE)
    assert path == tmp_path / f"circle{extension}"
    assert read_record(path) == MADE
    with Image.open(path) as picture:
        assert picture.size == (40, 24)
        assert picture.format == picture_format(path)
        if extension == ".png":
            np.testing.assert_array_equal(np.asarray(picture), PIXELS)
            assert picture.info["parameters"] == to_text(MADE)
    assert [p.name for p in tmp_path.iterdir()] == [f"circle{extension}"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_without_settings_there_is_no_metadata(tmp_path: Path, extension: str) -> None:
    path = save_picture(Image.fromarray(PIXELS), tmp_path / f"circle{extension}")
    with Image.open(path) as picture:
        assert not picture.getexif()
        assert "parameters" not in picture.info
    with pytest.raises(RequestError, match="no settings"):
        read_record(path)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompt=st.text(max_size=60), extension=st.sampled_from(EXTENSIONS))
def test_any_prompt_survives_the_file(tmp_path: Path, prompt: str, extension: str) -> None:
    made = PictureRecord(request=Request(prompts=(prompt,), negative_prompts=(prompt,), seed=0))
    path = save_picture(PIXELS, tmp_path / f"any{extension}", made, overwrite=True)
    assert read_record(path) == made


def test_a_picture_that_a1111_made(tmp_path: Path) -> None:
    text = "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 40x24, Version: v1.9"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    assert read_record(tmp_path / "a.png").request.sampler.scheduler == "euler_ancestral"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a fox 狐\nSteps: 20, Seed: 5, Size: 40x24".encode("utf-16-be"),
        b"UNICODE\0" + "a fox 狐\nSteps: 20, Seed: 5, Size: 40x24".encode("utf-16-le"),
        b"\0" * 8 + "a fox 狐\nSteps: 20, Seed: 5, Size: 40x24".encode(),
    ],
)
def test_comments_in_every_code(tmp_path: Path, comment: bytes) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif.tobytes())
    found = read_record(tmp_path / "a.jpg")
    assert (found.prompt, found.request.seed) == ("a fox 狐", 5)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (1, 1)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 4))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


BOMB = zlib.compress(b"a" * (64 * 2**20))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a PNG"),
    "text": (b"not a picture at all", "not a PNG"),
    "a GIF": (b"GIF89a" + b"\0" * 50, "not a PNG"),
    "cut off": (png()[:30], "not a PNG"),
    "a wide bomb": (png(size=(60_000, 60_000)), "absurdly large"),
    "a text bomb": (
        png(chunk(b"zTXt", b"parameters\0\0" + BOMB)),
        "not a PNG|too long|no settings",
    ),
    "an international bomb": (
        png(chunk(b"iTXt", b"parameters\0\1\0\0\0" + BOMB)),
        "not a PNG|too long|no settings",
    ),
    "long text": (
        png(chunk(b"tEXt", b"parameters\0" + b"a" * (MAX_TEXT + 1))),
        "too long|not a PNG",
    ),
    "a wrong checksum": (png(chunk(b"tEXt", b"parameters\0a")[:-1] + b"\0"), "not a PNG"),
    "a broken number": (
        png(chunk(b"tEXt", b"parameters\0a\nSteps: x, Seed: 1, Model: b")),
        "Steps",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "hostile.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=words) as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def whole_file(kind: str) -> bytes:
    """A small picture with settings in it, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        return save_picture(PIXELS, Path(folder) / f"a.{kind}", MADE).read_bytes()


WHOLE = {kind: whole_file(kind) for kind in ("png", "jpg", "webp")}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_pictures_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(list(WHOLE.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    refusal = ""
    try:
        read_record(path)
    except RequestError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="missing"):
        read_record(tmp_path / "none.png")
    with pytest.raises(RequestError):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["a.tiff", "a", "a.png.txt", ".png", "a.PNGX"])
def test_other_extensions_are_refused(tmp_path: Path, name: str) -> None:
    for act in (check_output, lambda path: save_picture(PIXELS, path)):
        with pytest.raises(RequestError, match=r"\.png"):
            act(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_pixels_are_refused(tmp_path: Path, pixels: Any) -> None:
    with pytest.raises(RequestError, match="uint8"):
        save_picture(pixels, tmp_path / "a.png")


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    words = "word " * 4000
    long = PictureRecord(request=Request(prompts=(words,), negative_prompts=(words,)))
    with pytest.raises(RequestError, match="too long for a JPEG"):
        save_picture(PIXELS, tmp_path / "a.jpg", long)
    with pytest.raises(RequestError, match="16383"):
        save_picture(np.zeros((1, 16_384, 3), np.uint8), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
    for extension in (".png", ".webp"):
        path = save_picture(PIXELS, tmp_path / f"a{extension}", long)
        assert read_record(path) == long


def test_where_a_picture_cannot_go_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="is not there"):
        check_output(tmp_path / "none" / "a.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        check_output(tmp_path / "file" / "a.png")
    check_output(tmp_path / "a.png")
    check_output(str(tmp_path / "a-%03d.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
