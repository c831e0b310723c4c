from __future__ import annotations

from pathlib import Path

import pytest

from sdvino.compress.prompts import GENERAL_PROMPTS, check_prompts
from sdvino.errors import RequestError
from sdvino.inputs.files import read_prompts


def test_the_general_list_is_varied() -> None:
    assert len(set(GENERAL_PROMPTS)) == len(GENERAL_PROMPTS) >= 48


def test_a_prompt_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# mine\n a fox \r\n\nein Fuchs, grün\n", encoding="utf-8")
    assert read_prompts(file) == ("a fox", "ein Fuchs, grün")


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n", b"\xff\xfe\xff", b"x" * 3000])
def test_a_file_without_usable_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(RequestError):
        check_prompts(read_prompts(file))


def test_a_missing_file_and_a_single_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="missing"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(RequestError, match="no prompts"):
        check_prompts("a fox")
