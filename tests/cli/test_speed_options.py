from __future__ import annotations

import pytest

from sdvino.cli.main import main
from sdvino.cli.speed_options import parse_size
from sdvino.errors import RequestError


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
