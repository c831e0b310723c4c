"""Checkpoints given to -m: what is refused before anything is written, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdvino.cli.main import main
from sdvino.errors import OutputError, RequestError
from sdvino.first_use.report import trim
from sdvino.first_use.resolve import ModelOptions, default_recipe, needs_conversion, resolve
from sdvino.first_use.sources import LocalSource
from sdvino.first_use.store import ConvertedModels, Made, models_dir, models_limit, names_of
from tests.conftest import ROOT, SHAPES, SHAPES_SOURCE
from tests.convert.mini_checkpoint import prefixed, shapes_of, write
from tests.first_use.store import add_interrupted, add_model, fail_on_waiting
from tests.tiny_folder import edit_json


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, which is not there yet."""
    monkeypatch.setenv("SDVINO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(place: Path) -> ConvertedModels:
    return ConvertedModels()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the demo model's diffusers folder, to be changed."""
    return Path(shutil.copytree(SHAPES_SOURCE, tmp_path / "source"))


def test_what_is_converted_and_what_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert needs_conversion(tmp_path / "model.safetensors")
    assert needs_conversion(SHAPES_SOURCE)
    assert not needs_conversion(SHAPES)
    assert not needs_conversion(tmp_path)
    assert not needs_conversion(tmp_path / "none")


def test_what_runs_as_it_is_is_found_without_converting(place: Path) -> None:
    assert resolve(None) == SHAPES
    assert resolve(str(SHAPES)) == SHAPES
    for model in (None, SHAPES):
        for asked in (ModelOptions(recipe="int8"), ModelOptions(gate=True)):
            with pytest.raises(RequestError, match="OpenVINO model already"):
                resolve(model, asked)
    assert not place.exists()


def test_info_tells_what_a_checkpoint_is(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(SHAPES_SOURCE), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["name"], facts["family"]) == ("shapes-source", "sd1")
    assert facts["converted to"] == default_recipe()
    assert main(["info", str(SHAPES_SOURCE)]) == 0
    assert "family: sd1" in capfd.readouterr().out
    assert not place.exists()


LORA = {
    "lora_unet_down_blocks_0.lora_up.weight": (4, 1),
    "lora_unet_down_blocks_0.lora_down.weight": (1, 4),
}
NO_TEXT = {n: s for n, s in shapes_of("sd1").items() if not n.startswith("cond_stage_model")}


def files(folder: Path) -> Iterator[Path]:
    """Give files that are no whole checkpoint."""
    yield write(folder / "lora.safetensors", LORA)
    yield write(folder / "vae.safetensors", {"encoder.conv_in.weight": (4, 3, 3, 3)})
    yield write(folder / "unet.safetensors", {"input_blocks.0.0.weight": (4, 3, 3, 3)})
    yield write(folder / "pruned.safetensors", NO_TEXT)
    yield write(folder / "other.safetensors", {"weight": (4,)})
    yield write(folder / "flux.safetensors", prefixed("double_blocks.0.", {"img": (4,)}))
    for name in ("model.ckpt", "model.pt", "random.safetensors", "model.gguf", "picture.png"):
        (folder / name).write_bytes(b"\x80\x04some bytes that are no weights")
        yield folder / name


@pytest.mark.parametrize("recipe", [[], ["--recipe", "fp16"]])
def test_a_file_that_is_no_checkpoint_gets_convert_s_sentence(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: list[str]
) -> None:
    target = str(tmp_path / "target")
    for path in files(tmp_path):
        assert main(["convert", str(path), target, "--dry-run"]) == 2
        expected = capfd.readouterr().err
        words = ["generate", "x", "-m", str(path), "-o", str(tmp_path / "o.png"), *recipe]
        assert main(words) == 2
        shown = capfd.readouterr()
        assert shown.err == expected
        assert shown.out == ""
        assert not place.exists()
        assert not (tmp_path / "o.png").exists()


def no_weights(folder: Path) -> None:
    for path in folder.glob("unet/*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def inpainting(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", in_channels=9)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/tokenizer.json",
        "unet/config.json",
        "calibration_prompts.txt",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_terabyte_of_nothing_is_not_read(place: Path, source: Path, name: str) -> None:
    with (source / name).open("ab") as file:
        file.truncate(2**40)
    for model in (source, source / name) if name.endswith(".safetensors") else (source,):
        assert LocalSource(model).unread < 2**30
        LocalSource(model).key()
        with pytest.raises(RequestError):
            resolve(model, ModelOptions(recipe="fp16"))
    assert not ConvertedModels().entries()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_weights, "pickle"),
        (inpainting, "pictures from text alone"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "config.json"),
        (lambda folder: edit_json(folder / "model_index.json", _class_name="X"), "X"),
        (lambda folder: os.truncate(next(folder.glob("vae/*.safetensors")), 99), "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "bench", "tune"])
def test_a_folder_that_cannot_be_converted(
    place: Path,
    source: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    words: str,
    command: str,
) -> None:
    damage(source)
    prompt = ["x", "-o", str(source / "o.png")] if command == "generate" else []
    for recipe in ("int8", "fp16"):
        assert main([command, *prompt, "-m", str(source), "--recipe", recipe]) == 2
        shown = capfd.readouterr()
        assert words in shown.err
        assert len(shown.err.splitlines()) == 1
        assert not place.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", str(SHAPES_SOURCE), "--recipe", "int9"], "int9"),
        (["-m", str(SHAPES_SOURCE), "--recipe", "none.toml"], "none.toml"),
        (["-m", str(SHAPES_SOURCE), "--revision", "main"], "--revision"),
        (["-m", str(SHAPES), "--recipe", "fp16"], "--recipe"),
        (["--gate"], "bundled"),
        (["-m", "none.safetensors"], "none.safetensors"),
        (["-m", "folder/none.safetensors"], "folder/none.safetensors"),
        (["-m", "owner/name/../x.safetensors"], "hub id"),
    ],
)
def test_wrong_requests(
    place: Path, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["bench", *options]) == 2
    assert words in capfd.readouterr().err
    assert not place.exists()


def test_a_place_that_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        monkeypatch.setenv("SDVINO_MODELS_DIR", str(tmp_path / folder))
        with pytest.raises(OutputError, match="SDVINO_MODELS_DIR"):
            resolve(SHAPES_SOURCE, ModelOptions(recipe="fp16"))
    assert not (place / "converted").exists()


def test_too_little_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(OutputError, match=r"1\.0 MB are free.*SDVINO_MODELS_DIR"):
        resolve(SHAPES_SOURCE, ModelOptions(recipe="fp16"))
    assert not (place / "converted").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_a_folder_that_others_could_have_written_to(store: ConvertedModels) -> None:
    entry = add_model(store, "key")
    entry.path.chmod(0o777)
    with pytest.raises(OutputError, match="SDVINO_MODELS_DIR"):
        store.entry("key")
    assert store.entries() == []
    entry.path.chmod(0o700)
    (store.root / "link").symlink_to(entry.path)
    with pytest.raises(OutputError, match="in the way"):
        store.entry("link")


def test_where_and_how_much(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models_dir() == place / "converted"
    assert models_limit() == 20 * 10**9
    monkeypatch.setenv("SDVINO_MODELS_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("SDVINO_MODELS_LIMIT", "3GB")
    assert models_dir() == tmp_path / "elsewhere"
    assert models_limit() == 3 * 10**9
    for wrong in ("many", "3", "-1GB"):
        monkeypatch.setenv("SDVINO_MODELS_LIMIT", wrong)
        with pytest.raises(RequestError, match="SDVINO_MODELS_LIMIT"):
            models_limit()


def test_the_recipe_goes_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else 1)
    assert default_recipe() == "fp16"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: 1)
    assert default_recipe() == "int8"


def test_a_file_is_known_by_its_content(place: Path, tmp_path: Path) -> None:
    # Larger than what is read each time.
    path = write(tmp_path / "a.safetensors", {"weight": (2**22,)})
    os.utime(path, (1e9, 1e9))
    source = LocalSource(path)
    assert source.unread == path.stat().st_size
    key = source.key()
    moved = path.rename(tmp_path / "b.safetensors")
    assert LocalSource(moved).key() == key
    assert LocalSource(Path(shutil.copy(moved, tmp_path / "c.safetensors"))).key() == key
    with moved.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert LocalSource(moved).key() != key


def test_a_folder_is_known_by_what_converting_reads(place: Path, source: Path) -> None:
    key = LocalSource(SHAPES_SOURCE).key()
    assert LocalSource(source).key() == key
    (source / "README.md").write_text("another")
    (source / "unet" / "notes.md").write_text("another")
    moved = source.rename(source.with_name("moved"))
    assert LocalSource(moved).key() == key
    edit_json(moved / "scheduler" / "scheduler_config.json", prediction_type="sample")
    changed = LocalSource(moved).key()
    assert changed != key
    save_file({"weight": np.ones(1)}, moved / "vae" / "diffusion_pytorch_model.safetensors")
    assert LocalSource(moved).key() not in (key, changed)


#: Runs the model `oldest` until it is told to end.
RUNNER = """
import sys
from sdvino.first_use.store import ConvertedModels
store = ConvertedModels()
print(store.use(store.entry("oldest")), flush=True)
sys.stdin.read()
"""


def test_the_least_recently_used_go_first(store: ConvertedModels) -> None:
    for age, key in enumerate(("newest", "old", "older", "oldest")):
        add_model(store, key, name=key, used=1e9 - age * 1e6)
    add_interrupted(store, "begun", name="begun")
    os.utime(store.root / "begun" / "entry.json", (1e8, 1e8))
    newest = next(entry for entry in store.entries() if entry.path.name == "newest")
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline().strip() == b"True"
        os.utime(store.root / "oldest" / "entry.json", (5e8, 5e8))
        trim(ConvertedModels(store.root, int(3.5 * newest.bytes)), newest, said.append)
        assert [entry.path.name for entry in store.entries()] == ["oldest", "old", "newest"]
        runner.communicate()
    # Nobody runs it now. What is just in use stays, however large it is.
    trim(ConvertedModels(store.root, 1), newest, said.append)
    assert [entry.path.name for entry in store.entries()] == ["newest"]
    names = [line.split()[1] for line in said]
    assert names == ["begun-int8", "older-int8", "oldest-int8", "old-int8"]
    assert all("SDVINO_MODELS_LIMIT" in line for line in said)
    assert not list(store.root.glob(".removing-*"))


def test_a_model_is_kept_from_being_removed_while_it_runs(store: ConvertedModels) -> None:
    entry = add_model(store, "key")
    assert store.use(entry)
    assert store.use(entry)
    assert len(list(entry.path.glob("using-*"))) == 1
    assert store.remove(entry) is None
    assert entry.complete


def test_a_model_that_is_converted_is_not_removed(store: ConvertedModels) -> None:
    with store.converting("key", Made(name="n", recipe="r", source="s"), fail_on_waiting) as entry:
        assert store.remove(entry) is None
    assert store.entries() == []  # nothing came of it


def test_names_are_unique(store: ConvertedModels) -> None:
    for key, name, recipe in (
        ("aaaaaaaa", "one", "int8"),
        ("bbbbbbbb", "one", "fp16"),
        ("cccccccc", "one", "int8"),
    ):
        add_model(store, key, name=name, recipe=recipe)
    assert set(names_of(store.entries())) == {"one-int8-aaaaaa", "one-int8-cccccc", "one-fp16"}
    assert "one-fp16" not in names_of(store.entries(), ["one-fp16"])


def test_a_damaged_note_costs_the_name_alone(store: ConvertedModels) -> None:
    entry = add_model(store, "key")
    for text in ("", "[]", json.dumps({"name": 1}), json.dumps({"name": "x"})):
        (entry.path / "entry.json").write_text(text)
        found = store.entry("key")
        assert found is not None
        assert found.complete
        assert found.made.name == "unknown"
