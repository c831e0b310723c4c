"""CLIP's vocabulary, for checkpoints that come without a tokenizer.

A single file holds weights alone. Every Stable Diffusion model reads text with the same byte-pair
vocabulary, which is found here on this machine: nothing is fetched.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdvino.errors import ModelFolderError, RequestError
from sdvino.text.vocabulary import read_tokenizer_files

#: Tokens of CLIP: 256 bytes, the same at the end of a word, the merges and two special ones.
CLIP_TOKENS = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77

_OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = CLIP_TOKENS - 512 - 2
# What may have been downloaded to the hub's cache before, and where it keeps its tokenizer.
_HUB = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ""),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ""),
)
_FILES = ("vocab.json", "merges.txt")


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
    """Return CLIP's vocabulary from the folder ``tokenizer``, the hub's cache or open_clip_torch.

    ``tokens`` is the number of rows of the text encoder's embedding. Raises RequestError when the
    folder holds no tokenizer or another one, and, without a folder, when there is none anywhere.
    """
    if tokenizer is not None:
        found: Vocabulary | None = _from_folder(tokenizer)
    else:
        found = _from_hub_cache()
        if found is None:
            found = _from_open_clip()
    if found is None:
        raise RequestError(
            "A single file holds no tokenizer, and CLIP's vocabulary is not on this machine:"
            " give the tokenizer folder of any Stable Diffusion model with --tokenizer FOLDER,"
            " or download openai/clip-vit-large-patch14 to the hub's cache, or run"
            " `pip install open_clip_torch`."
        )
    if len(found.vocab) != tokens:
        where = "the vocabulary found here" if tokenizer is None else str(tokenizer)
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


def _from_hub_cache() -> Vocabulary | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in _HUB:
        paths = [try_to_load_from_cache(repository, f"{folder}{name}") for name in _FILES]
        if not all(isinstance(path, str) for path in paths):
            continue
        try:
            found = _read(Path(str(paths[0])).parent)
        except ModelFolderError:  # a download that was cut off
            continue
        if len(found.vocab) == CLIP_TOKENS:
            return found
    return None


def _from_open_clip() -> Vocabulary | None:
    """Read the file that open_clip_torch ships, without importing open_clip (which takes torch)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _OPEN_CLIP_FILE
    return read_bpe(path) if path.is_file() else None


def read_bpe(path: Path) -> Vocabulary:
    """Read a ``bpe_simple_vocab_16e6.txt.gz``: a line about itself, then a merge a line.

    Source: simple_tokenizer.py of openai/CLIP. Raises RequestError for another file.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read(64 * 2**20).split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _no_bpe(path) from error
    merges = [(words[0], words[1]) for line in lines if len(words := line.split()) == 2]
    letters = _alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != CLIP_TOKENS:
        raise _no_bpe(path)
    return Vocabulary(vocab, merges)


def _no_bpe(path: Path) -> RequestError:
    return RequestError(
        f"{path} is not CLIP's vocabulary; run `pip install --force-reinstall open_clip_torch`, or"
        " give the tokenizer folder of a Stable Diffusion model with --tokenizer FOLDER."
    )


def _alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes, in the vocabulary's order (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
