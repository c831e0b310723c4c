"""CLIP's vocabulary, for checkpoints that come without a tokenizer.

A single file holds weights alone. Every Stable Diffusion model reads text with the same byte-pair
vocabulary, OpenAI's, which comes with sdvino: clip/, its licence beside it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdvino.errors import RequestError
from sdvino.text.vocabulary import read_tokenizer_files

#: Tokens of CLIP: 256 bytes, the same at the end of a word, the merges and two special ones.
CLIP_TOKENS = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77

# Of openai/CLIP at d05afc43, clip/bpe_simple_vocab_16e6.txt.gz.
_FILE = Path(__file__).parent / "clip" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = CLIP_TOKENS - 512 - 2


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-pair vocabulary: each token's id, and the merges in order."""

    vocab: dict[str, int]
    merges: Sequence[tuple[str, str]]

    def write(self, folder: Path, *, pad: str) -> None:
        """Write a CLIP tokenizer into ``folder``, padding with the token ``pad``."""
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "vocab.json", json.dumps(self.vocab, ensure_ascii=False))
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        _write(folder / "merges.txt", "\n".join(lines) + "\n")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_LENGTH,
            "do_lower_case": True,
        }
        _write(folder / "tokenizer_config.json", json.dumps({**special, **config}, indent=2))


def find_vocabulary(tokenizer: Path | None = None, *, tokens: int = CLIP_TOKENS) -> Vocabulary:
    """Return CLIP's vocabulary, or the one in the folder ``tokenizer``.

    ``tokens`` is the number of rows of the text encoder's embedding. Raises RequestError when the
    folder holds no tokenizer, and when the vocabulary has another number of tokens.
    """
    found = _bundled() if tokenizer is None else _from_folder(tokenizer)
    if len(found.vocab) != tokens:
        where = "CLIP's vocabulary" if tokenizer is None else str(tokenizer)
        raise RequestError(
            f"The text encoder knows {tokens} tokens and {where} has {len(found.vocab)};"
            " give this model's own tokenizer with --tokenizer FOLDER."
        )
    return found


def _from_folder(folder: Path) -> Vocabulary:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise RequestError(f"{folder} {what}; give a folder with vocab.json and merges.txt.")
    # A whole model's folder will do.
    inner = folder / "tokenizer"
    return _read(inner if inner.is_dir() else folder)


def _read(folder: Path) -> Vocabulary:
    files = read_tokenizer_files(folder)
    for token in (START, END):
        if token not in files.vocab:
            raise RequestError(
                f"The tokenizer in {folder} has no {token}, so it is not CLIP's;"
                " give the tokenizer of a Stable Diffusion model."
            )
    return Vocabulary(files.vocab, files.merges)


def _bundled() -> Vocabulary:
    """Read the file that comes with sdvino: a line about itself, then a merge a line.

    Source: simple_tokenizer.py of openai/CLIP. CLIP takes the first 48,894 of its merges.
    """
    with gzip.open(_FILE, "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]
    merges = [(left, right) for left, right in map(str.split, lines)]
    letters = _alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return Vocabulary({token: number for number, token in enumerate(tokens)}, merges)


def _alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes, in the vocabulary's order (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
