"""Folders of pictures with captions, and what is wrong with some."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvino.errors import RequestError
from sdvino.train.distillation.pictures import find_pictures, load_pictures


def picture(path: Path, colour: str = "red") -> None:
    Image.new("RGB", (6, 4), colour).save(path)


def test_captions_stand_beside_or_in_a_table(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        picture(tmp_path / name, colour="blue")
    (tmp_path / "b.txt").write_text(" a blue field\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    line = {"file_name": "c.webp", "text": "the sea", "more": 1}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n\n", encoding="utf-8")
    found = find_pictures(tmp_path)
    assert [(one.path.name, one.caption) for one in found] == [
        ("a.JPG", ""),
        ("b.png", "a blue field"),
        ("c.webp", "the sea"),
    ]
    loaded = load_pictures(found[1:], (8, 16))
    assert loaded.shape == (2, 3, 8, 16)
    assert loaded[0, 2].min() == 1.0
    assert loaded[0, 0].max() == -1.0


def test_pictures_are_scaled_to_cover_and_cut_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a band", encoding="utf-8")
    loaded = load_pictures(find_pictures(tmp_path), (4, 4))
    assert loaded.min() > 0.9


def no_folder(folder: Path) -> Path:
    return folder / "none"


def empty(folder: Path) -> Path:
    return folder


def no_caption(folder: Path) -> Path:
    picture(folder / "x.png")
    return folder


def long_caption(folder: Path) -> Path:
    picture(folder / "x.png")
    (folder / "x.txt").write_text("a" * 2001, encoding="utf-8")
    return folder


def no_text(folder: Path) -> Path:
    picture(folder / "x.png")
    (folder / "x.txt").write_bytes(b"\xff\xfe\xfa")
    return folder


def no_table(folder: Path) -> Path:
    picture(folder / "x.png")
    (folder / "metadata.jsonl").write_text('["x.png", "a field"]\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_folder, "is no folder"),
        (empty, "holds no pictures"),
        (no_caption, "x.png has no caption; write it to x.txt"),
        (long_caption, "over 2,000 characters"),
        (no_text, "is not UTF-8 text"),
        (no_table, "no table of captions"),
    ],
)
def test_folders_that_teach_nothing_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        find_pictures(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    (tmp_path / "x.txt").write_text("a field", encoding="utf-8")
    with pytest.raises(RequestError, match=r"x\.png is no picture"):
        load_pictures(find_pictures(tmp_path), (8, 8))
