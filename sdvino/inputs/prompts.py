"""Lists of prompts, one on each line."""

from __future__ import annotations

from pathlib import Path

from sdvino.errors import RequestError
from sdvino.inputs.files import read_text

#: Bytes of a list; a prompt has some hundred.
MAX_BYTES = 4 * 2**20


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts in the UTF-8 text file ``path``; empty lines and `#` lines are skipped.

    A line ends at a line feed, with or without a carriage return before it, and at nothing else.
    Raises RequestError for a file that is none, is over `MAX_BYTES`, or holds no prompt.
    """
    text = read_text(
        path, limit=MAX_BYTES, error=RequestError, remedy="give a text file with a prompt a line"
    )
    lines = (line.strip() for line in text.split("\n"))
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise RequestError(f"{path} holds no prompt; write one on each line.")
    return prompts
