from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdvino.errors import ModelFolderError, RequestError
from sdvino.text.tokenizer import ClipTokenizer
from sdvino.text.vocabulary import MAX_FILE_BYTES
from tests.text.folders import END, START, write_fast, write_legacy

AWKWARD = {
    "empty": "",
    "spaces": "   \t  ",
    "plain": "a red circle on the blue lighthouse",
    "capitals": "A RED Circle ON İstanbul ẞ",
    "accents NFC": "un été à Zürich, señor",
    "accents NFD": "un e\u0301te\u0301 a\u0300 Zu\u0308rich",
    "emoji": "a 🦊 and a 👍🏽 on 🇩🇪",
    "joined emoji": "👩\u200d👩\u200d👧\u200d👦 family",
    "Chinese": "一个红色的圆圈在蓝色背景上",
    "Japanese, Korean": "赤い円 ガラス ﾊﾝｶｸ 빨간 원",
    "Arabic, Hebrew, Thai": "دائرة حمراء עיגול אדום วงกลมสีแดง",
    "controls": "a\x00red\x07circle\x1b[0m \x7f\x85\u2028on\u2029",
    "newlines": "red\ncircle\r\n\r\non\tthe\vblue\f",
    "wide spaces": "red\u00a0circle\u3000on\u200bthe\ufeffblue",
    "apostrophes": "the house's light isn't ours, we'll say they'd 've 'M ’s",
    "digits": "1girl 2 000 ²½Ⅷ ١٢ 3.14e-10",
    "entities": "red &amp; blue &lt;circle&gt; &#39;on&#39; &nbsp;",
    "end token": f"red {END} circle",
    "start token": f"{START}red{START} circle{END}",
    "loud special": "red <|ENDOFTEXT|> circle <|EndOfText|>",
    "almost special": "<|endoftext <endoftext> |endoftext|>",
    "end of word": "red</w> circle </w>",
    "exclamations": "red! circle!!! !!on ! ¡",
    "punctuation": "(red:1.3), [blue]; {on|off} ~~~ ... --- \\ / $ % ^ _ __",
    "ligatures": "ﬁre ﬂy Ǆ ǆ ŉ",
    "combining": "Z" + "\u0300" * 60,
    "beyond the plane": "𝓇𝑒𝒹 𐍈 \U0010fffd",
    "long word": "lighthouse" * 40,
    "many words": "the red light on the blue house " * 20,
    "ten thousand": ("a red circle on the blue lighthouse, 🦊 été! " * 240)[:10_000],
    "ten thousand spaces": " " * 10_000,
}
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "legacy": write_legacy,
    "legacy with flags": partial(write_legacy, flags=True),
    "legacy, ! pads": partial(write_legacy, pad="!"),
    "fast": write_fast,
    "fast, ! pads": partial(write_fast, pad="!"),
    "fast with added words": partial(write_fast, added=("<shapes>", "Ölberg")),
}


class Pair:
    """Ours and transformers' tokenizer of the same folder."""

    def __init__(self, folder: Path) -> None:
        self.ours = ClipTokenizer.from_folder(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.theirs: Any = CLIPTokenizer.from_pretrained(folder)

    def check(self, text: str) -> None:
        expected = self.theirs(
            text, padding="max_length", max_length=77, truncation=True, return_tensors="np"
        )["input_ids"]
        ids = self.ours.encode(text).ids
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(ids, expected)


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(LAYOUTS[request.param](tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_ids_are_those_of_transformers(pair: Pair, text: str) -> None:
    pair.check(text)


PIECES = [
    "red",
    "light",
    "house's",
    "'",
    "!",
    " ",
    "\n",
    "é",
    "e\u0301",
    START,
    END,
    "<|",
    "7",
    "🦊",
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_ids_of_any_text_are_those_of_transformers(pair: Pair, text: str) -> None:
    pair.check(text)


def test_folder_of_transformers_own_making(tmp_path: Path) -> None:
    first = Pair(write_legacy(tmp_path / "first", pad="!", flags=True))
    first.theirs.save_pretrained(tmp_path / "saved")
    saved = Pair(tmp_path / "saved")
    for text in AWKWARD.values():
        saved.check(text)


def test_padding_and_length(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.from_folder(write_legacy(tmp_path, pad="!"), max_length=6)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    start, end, red = vocab[START], vocab[END], vocab["red</w>"]
    assert tokenizer.encode("red").ids.tolist() == [[start, red, end, 0, 0, 0]]
    assert tokenizer.encode("").ids.tolist() == [[start, end, 0, 0, 0, 0]]
    assert tokenizer.vocab_size == len(vocab)


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("red blue circle", ""),
        ("red blue circle on", ""),
        ("red blue circle on The  Lighthouse, été!", "The  Lighthouse, été!"),
        ("red blue circle on e\u0301te\u0301 🦊", "e\u0301te\u0301 🦊"),
        ("red blue circle on   ", ""),
    ],
)
def test_what_was_dropped_is_as_it_was_written(tmp_path: Path, text: str, dropped: str) -> None:
    tokenizer = ClipTokenizer.from_folder(write_legacy(tmp_path), max_length=6)
    assert tokenizer.encode(text).dropped == dropped


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.from_folder(write_legacy(tmp_path))
    with pytest.raises(RequestError, match="broken character"):
        tokenizer.encode("red \ud800")


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")

    return damage


def model(**changes: Any) -> Callable[[Path], None]:
    return edit("tokenizer.json", lambda d: {**d, "model": {**d["model"], **changes}})


def large(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)


def text(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "not JSON": (text("tokenizer.json", b"{"), "not valid JSON"),
    "a number without end": (text("tokenizer.json", b"1" * 9999), "too large"),
    "deep JSON": (text("tokenizer.json", b"[" * 200_000), "nested too deeply"),
    "not text": (text("tokenizer.json", b"\xff\xfe{}"), "UTF-8"),
    "a list": (text("tokenizer.json", b"[]"), "object"),
    "no model": (text("tokenizer.json", b"{}"), "vocabulary"),
    "too large": (large, "over 64 MB"),
    "another model": (model(type="Unigram"), "vocabulary"),
    "no vocabulary": (model(vocab={}), "vocabulary"),
    "ids that are text": (model(vocab={"a": "0"}), "whole number"),
    "ids that are true": (model(vocab={"a": True}), "whole number"),
    "an id twice": (model(vocab={"a": 1, "b": 1}), "two tokens"),
    "a huge id": (model(vocab={"a": 10**12}), "absurdly"),
    "merges of three": (model(merges=[["a", "b", "c"]]), "pair"),
    "merges missing": (model(merges=None), "merges"),
    "unknown merges": (model(merges=[["nowhere", "known"]]), "merges"),
    "flags that are text": (
        edit(
            "tokenizer.json",
            lambda d: {**d, "added_tokens": [{"id": 3, "content": "x", "lstrip": "yes"}]},
        ),
        "true or false",
    ),
    "an added token without id": (
        edit("tokenizer.json", lambda d: {**d, "added_tokens": [{"content": "x"}]}),
        "no id",
    ),
    "an added token far off": (
        edit("tokenizer.json", lambda d: {**d, "added_tokens": [{"id": 99_999, "content": "<x>"}]}),
        "larger than the number",
    ),
    "an unknown start": (
        edit("tokenizer_config.json", lambda d: {**d, "bos_token": "<nowhere>"}),
        "bos_token",
    ),
    "a start that is a number": (
        edit("tokenizer_config.json", lambda d: {**d, "bos_token": 7}),
        "short text",
    ),
    "nothing there": (lambda folder: (folder / "tokenizer.json").unlink(), "neither"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_lies_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    damage, words = WRONG[name]
    damage(write_fast(tmp_path))
    with pytest.raises(ModelFolderError, match=words) as caught:
        ClipTokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_merges_with_windows_line_ends(tmp_path: Path) -> None:
    merges = write_legacy(tmp_path) / "merges.txt"
    before = ClipTokenizer.from_folder(tmp_path).encode("red lighthouse").ids
    merges.write_bytes(merges.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(
        ClipTokenizer.from_folder(tmp_path).encode("red lighthouse").ids, before
    )
