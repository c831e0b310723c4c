"""`sdvino models` through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdvino.cli.main import main
from sdvino.first_use.store import ConvertedModels
from tests.first_use.store import add_interrupted, add_model
from tests.tiny_folder import make_tiny_folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConvertedModels:
    """A cache of converted models, beside a hub's cache with one model."""
    monkeypatch.setenv("SDVINO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make_tiny_folder(tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40))
    other = tmp_path / "hub" / "models--owner--other" / "snapshots" / ("1" * 40)
    other.mkdir(parents=True)
    (other / "model_index.json").write_text("{}")
    return ConvertedModels()


def test_every_model_is_listed(store: ConvertedModels, capfd: pytest.CaptureFixture[str]) -> None:
    add_model(store, "aaaaaaaa", name="dream", recipe="int8", used=1e9)
    add_model(store, "bbbbbbbb", name="dream", recipe="fp16", used=1.1e9)
    add_interrupted(store, "cccccccc", name="begun")
    assert main(["models"]) == 0
    table = capfd.readouterr().out.splitlines()
    words = [line.split()[:2] for line in table]
    assert words[1:-1] == [
        ["shapes", "bundled"],
        ["dream-fp16", "converted"],
        ["dream-int8", "converted"],
        ["begun-int8", "interrupted"],
        ["owner/name", "downloaded"],
    ]
    assert table[-1].startswith("converted: ")
    assert "of at most 20.00 GB" in table[-1]
    assert main(["models", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["limit_bytes"] == 20 * 10**9
    assert found["folder"] == str(store.root)
    rows = {model["name"]: model for model in found["models"]}
    assert rows["dream-int8"]["last_used"] == "2001-09-09T01:46:40Z"
    assert rows["dream-int8"]["bytes"] > 1000
    assert rows["dream-int8"]["path"] == str(store.root / "aaaaaaaa" / "model")
    assert rows["dream-int8"]["compared"] is False
    assert rows["begun-int8"]["family"] is None
    kept = [row["bytes"] for row in rows.values() if row["kind"] in ("converted", "interrupted")]
    assert found["bytes"] == sum(kept)


def test_nothing_is_made_where_nothing_is(
    tmp_path: Path, store: ConvertedModels, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    assert "converted: 0.0 MB" in capfd.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_converted_and_interrupted_ones_are_removed(
    store: ConvertedModels, capfd: pytest.CaptureFixture[str]
) -> None:
    size = add_model(store, "aaaaaaaa", name="dream").bytes
    add_model(store, "bbbbbbbb", name="other")
    add_interrupted(store, "cccccccc", name="begun")
    assert main(["models", "--remove", "dream-int8", "--remove", "begun-int8"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == f"removed dream-int8: {size / 1e6:.1f} MB freed"
    assert said[1].startswith("removed begun-int8: ")
    assert [entry.made.name for entry in store.entries()] == ["other"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shapes", "comes with sdvino"),
        ("owner/name", "hf cache"),
        ("none", "sdvino models"),
        ("dream", "no model 'dream'"),
        ("in-use-int8", "run or converted by a process"),
    ],
)
def test_what_is_not_removed(
    store: ConvertedModels, capfd: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    add_model(store, "aaaaaaaa", name="dream")
    assert store.use(add_model(store, "bbbbbbbb", name="in-use"))
    assert main(["models", "--remove", name]) == 2
    shown = capfd.readouterr()
    assert words in shown.err
    assert shown.out == ""
    assert len(store.entries()) == 2


def test_wrong_names_remove_nothing(
    store: ConvertedModels, capfd: pytest.CaptureFixture[str]
) -> None:
    add_model(store, "aaaaaaaa", name="dream")
    assert main(["models", "--remove", "dream-int8", "--remove", "none"]) == 2
    assert main(["models", "--remove", "dream-int8", "--json"]) == 2
    assert len(store.entries()) == 1
