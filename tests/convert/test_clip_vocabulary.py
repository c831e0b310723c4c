from __future__ import annotations

import gzip
import sys
from pathlib import Path

import make_synthetic
import pytest

from sdvino.convert import clip_vocabulary
from sdvino.convert.clip_vocabulary import CLIP_TOKENS, find_vocabulary, read_bpe
from sdvino.errors import RequestError
from sdvino.text.tokenizer import ClipTokenizer


def bpe_file(path: Path, merges: int | None = None) -> Path:
    pairs = make_synthetic.synthetic_merges()[:merges]
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(" ".join(pair) for pair in pairs)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join([*lines, "more merges", "than CLIP takes"]))
    return path


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a hub's cache and without open_clip_torch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def test_open_clip_s_file_gives_the_vocabulary(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    bpe_file(package / "bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.setattr(clip_vocabulary, "_from_hub_cache", lambda: None)
    found = find_vocabulary()
    assert len(found.vocab) == CLIP_TOKENS
    assert found == find_vocabulary(clip_folder) or make_synthetic.clip_merges()
    found.write(tmp_path / "written", pad="!")
    ours = ClipTokenizer.from_folder(tmp_path / "written", 77)
    assert ours.encode("a red circle").ids.shape == (1, 77)
    assert int(ours.encode("a").ids[0, -1]) == found.vocab["!"]


def test_the_hub_s_cache_gives_the_vocabulary(nothing_here: Path, clip_folder: Path) -> None:
    repository = nothing_here / "hub" / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    (snapshot / "vocab.json").write_bytes((clip_folder / "vocab.json").read_bytes())
    with pytest.raises(RequestError):  # half of it
        find_vocabulary()
    (snapshot / "merges.txt").write_bytes((clip_folder / "merges.txt").read_bytes())
    assert find_vocabulary() == find_vocabulary(clip_folder)


def test_a_whole_model_s_folder_serves(clip_folder: Path) -> None:
    assert find_vocabulary(clip_folder.parent) == find_vocabulary(clip_folder)


def test_without_any_the_sentence_says_what_to_do(nothing_here: Path) -> None:
    with pytest.raises(RequestError, match="--tokenizer") as caught:
        find_vocabulary()
    assert "open_clip_torch" in str(caught.value)
    assert "clip-vit-large-patch14" in str(caught.value)


def test_wrong_folders_are_refused(tmp_path: Path, clip_folder: Path) -> None:
    for folder, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "tokenizer.json"),
    ):
        with pytest.raises(RequestError, match=message):
            find_vocabulary(folder)
    with pytest.raises(RequestError, match="knows 530 tokens"):
        find_vocabulary(clip_folder, tokens=530)


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"\xff\xff"), gzip.compress(b"a")]
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="not CLIP's"):
        read_bpe(path)
    bpe_file(path, 100)
    with pytest.raises(RequestError, match="not CLIP's"):
        read_bpe(path)
