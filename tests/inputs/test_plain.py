from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.inputs.patterns import compile_pattern
from sdvino.inputs.plain import MAX_DEPTH, NotPlain, parse_json, parse_toml
from sdvino.inputs.shown import lines, markdown, one_line, shortened

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_what_json_can_hold_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


DEEP = MAX_DEPTH + 2
BAD_JSON = {
    "cut": (b'{"a": ', "damaged"),
    "no UTF-8": (b'{"a": "\xff"}', "UTF-8"),
    "NaN": (b"[NaN]", "NaN"),
    "infinity": (b"[-Infinity]", "Infinity"),
    "a huge float": (b"[1e400]", "too large"),
    "a huge whole number": (b"[1" + b"0" * 400 + b"]", "too large"),
    "digits without end": (b"[" + b"9" * 5000 + b"]", "too large"),
    "a name twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' stands in it twice"),
    "deep lists": (b"[" * DEEP + b"]" * DEEP, "deeply"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "deeply"),
    "depth without end": (b"[" * 200_000, "deeply"),
    "half a character": (rb'["\ud800"]', "Unicode"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_refused(name: str) -> None:
    raw, words = BAD_JSON[name]
    with pytest.raises(NotPlain, match=words):
        parse_json(raw)


def test_a_whole_number_past_64_bits_is_a_float() -> None:
    """transformers writes int(1e30) for a tokenizer without a length."""
    value = parse_json(b'{"model_max_length": 1000000000000000019884624838656}')
    assert value == {"model_max_length": 1e30}
    assert isinstance(value["model_max_length"], float)


def test_depth_and_pairs_that_are_allowed() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse_json(rb'["\ud83d\ude00", "\u0120a"]') == ["\U0001f600", "\u0120a"]


BAD_TOML = {
    "names of many parts": (b".".join([b"a"] * 50_000) + b" = 1", "dots"),
    "quoted parts": (b'"a".' * 5000 + b"b = 1", "dots"),
    "in a table's name": (b"[" + b"a." * 5000 + b"a]", "dots"),
    "deep": (b"a = " + b"[" * 50_000, "deeply"),
    "deep enough": (b"a = " + b"[" * DEEP + b"]" * DEEP, "deeply"),
    "a huge number": (b"a = " + b"9" * 100, "too large"),
    "digits without end": (b"a = " + b"9" * 5000, "4300"),
    "not a number": (b"a = nan", "none"),
    "no TOML": (b"a = ", "value"),
    "no UTF-8": (b"a = '\xff'", "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_toml_that_is_refused(name: str) -> None:
    raw, words = BAD_TOML[name]
    with pytest.raises(NotPlain, match=re.compile(words, re.IGNORECASE)):
        parse_toml(raw)


def test_dots_within_text_are_no_names() -> None:
    text = "." * 300
    raw = f"a = '{text}' # {text}\nb = [\"{text}\", 1.5]\r\nc = '''\n{text}'''\n"
    assert parse_toml(raw.encode()) == {"a": text, "b": [text, 1.5], "c": text}


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "((((" * 2000,
        "a{99999999999999999999}",
        "(a+)+$",
        "((ab)*c){2,}",
        "a*a*a*a*a*b",
        "(?:" * 99,
    ],
)
def test_patterns_that_are_refused(pattern: str) -> None:
    assert compile_pattern(pattern) is None


@pytest.mark.parametrize(
    "pattern", ["attn[12]", r"^unet\.down_blocks\.\d+\..*to_[qkv]$", "(a|b)?c{2}", "(?i)mid(?=x)"]
)
def test_patterns_that_people_write(pattern: str) -> None:
    assert compile_pattern(pattern) == re.compile(pattern)


def test_control_characters_are_shown() -> None:
    text = "a\x1b]0;owned\x07\n\x9b31m\u202ereversed\u2028\ud800\tz"
    assert one_line(text) == ("a\\x1b]0;owned\\x07\\x0a\\x9b31m\\u202ereversed\\u2028\\ud800\\x09z")
    assert lines("a\n\tb\x1b[2J") == "a\n\tb\\x1b[2J"
    kept = "été 日本語 👩‍🚀 café"
    assert one_line(kept) == lines(kept) == kept


@given(st.text())
def test_markdown_shows_text_and_nothing_else(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown
    assert re.search(r"(?<!\\)(?:\\\\)*[*_`\[\]<>#|!&~]", shown) is None


def test_numbers_are_finite() -> None:
    assert math.isfinite(parse_json(b"[1e308]")[0])


def test_a_long_message_keeps_its_two_ends() -> None:
    assert shortened("short") == "short"
    text = shortened("begin" + "x" * 10_000 + "end.")
    assert text.startswith("begin")
    assert text.endswith("end.")
    assert len(text) < 1010
