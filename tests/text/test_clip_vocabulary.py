from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sdvino.errors import RequestError
from sdvino.text import clip_vocabulary
from sdvino.text.clip_vocabulary import CLIP_TOKENS, END, START, find_vocabulary
from sdvino.text.tokenizer import ClipTokenizer

FOLDER = Path(clip_vocabulary.__file__).parent / "clip"
#: Of the file in openai/CLIP.
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_the_file_is_openai_s_with_its_licence() -> None:
    content = (FOLDER / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    licence = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License")
    assert "OpenAI" in licence


def test_the_vocabulary_is_clip_s() -> None:
    found = find_vocabulary()
    assert len(found.vocab) == CLIP_TOKENS
    assert len(found.merges) == 49_152 - 256 - 2
    assert sorted(found.vocab.values()) == list(range(CLIP_TOKENS))
    assert (found.vocab[START], found.vocab[END]) == (49_406, 49_407)
    # As openai/clip-vit-large-patch14's vocab.json and merges.txt have them.
    assert found.vocab["!"] == 0
    assert found.vocab["a</w>"] == 320
    assert found.vocab["photo</w>"] == 1125
    assert found.merges[:2] == [("i", "n"), ("t", "h")]


def test_what_is_written_is_a_tokenizer(tmp_path: Path) -> None:
    find_vocabulary().write(tmp_path, pad="!")
    ids = ClipTokenizer.from_folder(tmp_path, 77).encode("a photo of an astronaut").ids
    assert ids.shape == (1, 77)
    # CLIPTokenizer of openai/clip-vit-large-patch14.
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 550, 18376, 49407, 0]


def test_a_whole_model_s_folder_serves(tmp_path: Path) -> None:
    find_vocabulary().write(tmp_path / "tokenizer", pad=END)
    assert find_vocabulary(tmp_path) == find_vocabulary(tmp_path / "tokenizer") == find_vocabulary()


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "tokenizer.json"),
    ):
        with pytest.raises(RequestError, match=message):
            find_vocabulary(folder)
    find_vocabulary().write(tmp_path, pad=END)
    for given in (None, tmp_path):
        with pytest.raises(RequestError, match="knows 530 tokens"):
            find_vocabulary(given, tokens=530)
