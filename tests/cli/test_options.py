from __future__ import annotations

import json

import pytest

from sdvino.cli.generate import _say_unlike
from sdvino.cli.main import main
from sdvino.cli.options import MEASURED
from sdvino.errors import RequestError
from sdvino.inputs.shown import parse_size
from sdvino.request import PictureRecord, Request
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3 * 10**9),
        ("3g", 3 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("800MB", 8 * 10**8),
        ("2000000000", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "", "GB", "-3GB", "3TB", "1e9", "3 G B", "nan", "9" * 40])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="--max-memory"):
        parse_size(text)


@pytest.mark.parametrize(
    "options",
    [
        ["--max-memory", "4"],
        ["--guidance-interval", "0.8", "0.2"],
        ["--token-downsampling", "3"],
        ["--cache-interval", "0"],
        ["--low-memory", "--cache-interval", "2"],
    ],
)
def test_wrong_options_end_with_a_sentence(
    options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a red circle", "--steps", "1", "-q", *options]) == 2
    message = capfd.readouterr().err
    assert len(message.strip().splitlines()) == 1
    assert "Traceback" not in message


def test_what_help_says_of_a_cost_is_what_was_measured() -> None:
    found = json.loads((ROOT / "docs" / "fast.json").read_text(encoding="utf-8"))["results"]
    exact, *others = found
    measured = {one["variant"]["options"]: one for one in others}
    for option, (faster, points) in MEASURED.items():
        one = measured[option]
        assert faster == round(exact["seconds"] / one["seconds"], 1)
        assert points == round(100 * one["change"]["value"], 1)


def test_every_approximation_says_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("prompt adherence") == len(MEASURED)
    assert said.count("too small to gain time") == sum(gain <= 1 for gain, _ in MEASURED.values())
    assert "The demo model with 0 0.8:" in said


def test_long_names_in_a_picture_are_shown_short(capsys: pytest.CaptureFixture[str]) -> None:
    record = PictureRecord(
        request=Request(prompts=("a cat",)), model="x" * 5000, other=(("Sampler", "y" * 5000),)
    )
    _say_unlike("like.png", record, "shapes")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert max(map(len, said)) < 300
