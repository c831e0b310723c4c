from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdvino.convert.hub_source import choose_files, is_hub_source, split_file
from sdvino.convert.open_source import Told, open_source, outline_source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import ModelFolderError, RequestError
from tests.convert.mini_checkpoint import shapes_of, write
from tests.hub_server import COMMIT, LATER, serving
from tests.tiny_folder import make_tiny_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)
PLAIN = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
HALF = tuple(name.replace(".safetensors", ".fp16.safetensors") for name in PLAIN)
SHARDS = (
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
)
NEVER = (
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "safety_checker/model.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "pipeline.py",
    "README.md",
)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ((*CONFIGS, *PLAIN, *NEVER), (*CONFIGS, *PLAIN)),
        ((*CONFIGS, *PLAIN, *HALF, *NEVER), (*CONFIGS, *HALF)),
        ((*CONFIGS, *PLAIN, HALF[0]), (*CONFIGS, HALF[0], *PLAIN[1:])),
        ((*CONFIGS, *SHARDS, *PLAIN[1:]), (*CONFIGS, *SHARDS, *PLAIN[1:])),
        (
            (*CONFIGS, "unet/openvino_model.xml", "unet/openvino_model.bin", *PLAIN),
            (*CONFIGS, "unet/openvino_model.xml", "unet/openvino_model.bin"),
        ),
        (("README.md", "model.safetensors", "model.ckpt"), ("model.safetensors",)),
    ],
)
def test_one_variant_of_the_weights_and_no_pickle_is_chosen(
    names: Sequence[str], chosen: Sequence[str]
) -> None:
    assert set(choose_files("owner/name", None, names)) == set(chosen)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.safetensors", "b.safetensors"), "owner/name/a.safetensors"),
        ((*CONFIGS, "unet/diffusion_pytorch_model.bin"), "pickles"),
        (("model.ckpt",), "pickles"),
        (("README.md",), "no Stable Diffusion"),
        ((), "no Stable Diffusion"),
    ],
)
def test_repositories_without_a_model_get_a_sentence(names: Sequence[str], message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        choose_files("owner/name", None, names)


def test_a_single_file_in_a_repository_may_be_named() -> None:
    assert split_file("owner/name") == ("owner/name", None)
    assert split_file("owner/name/a/b.safetensors") == ("owner/name", "a/b.safetensors")
    assert choose_files("o/n", "b.safetensors", ["b.safetensors", "c"]) == ["b.safetensors"]
    with pytest.raises(ModelFolderError, match="spelling"):
        choose_files("o/n", "d.safetensors", ["b.safetensors"])


@pytest.mark.parametrize("text", ["a", "a/b/c", "../a", "/a/b", "a/../b.safetensors", "", "a b/c"])
def test_what_is_no_hub_id(text: str) -> None:
    assert not is_hub_source(text)


def run_in_process(
    words: Sequence[str], hub: str, cache: Path, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process: huggingface_hub reads its settings when it is imported."""
    own = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *words],
        env={**inherited, **own},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


OPEN = """
import sys
from pathlib import Path
from sdvino.convert.open_source import Told, open_source
from sdvino.errors import SdvinoError
for source in sys.argv[3:]:
    try:
        tokenizer = Path(sys.argv[2]) if sys.argv[2] else None
        found = open_source(source, Path(sys.argv[1]), Told(tokenizer=tokenizer))
        print(found.name, found.family.name, found.path)
    except SdvinoError as error:
        print(type(error).__name__, error)
"""


def open_in_process(
    hub: str, cache: Path, *sources: str, tokenizer: str = "", offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Open ``sources``, and print what they are."""
    words = ["-c", OPEN, str(cache / "work"), tokenizer, *sources]
    done = run_in_process(words, hub, cache, offline)
    done.check_returncode()
    return done


def look_in_process(
    hub: str, cache: Path, source: str, *options: str, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run `sdvino convert SOURCE out --dry-run`."""
    words = ["-m", "sdvino", "convert", source, "out", "--dry-run", *options]
    return run_in_process(words, hub, cache, offline)


def test_a_diffusers_repository_is_downloaded_and_opened(source: Path, tmp_path: Path) -> None:
    for name in NEVER:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "unet" / "diffusion_pytorch_model.safetensors", source / name)
    with serving(source) as hub:
        first = open_in_process(hub.address, tmp_path / "cache", "owner/name")
        name, family, path = first.stdout.split()
        assert (name, family) == ("owner/name", "sd1")
        assert "Downloading owner/name: 10 files" in first.stderr
        assert not {file for file in NEVER if (Path(path) / file).exists()}
        address = hub.address
    again = open_in_process(address, tmp_path / "cache", "owner/name", offline="1")
    assert again.stdout == first.stdout
    assert "Downloading" not in again.stderr


def test_a_single_file_on_the_hub_is_a_source(clip_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    write(repository / "model.safetensors", shapes_of("sd1"))
    (repository / "model.ckpt").write_bytes(b"\x80\x04.")
    with serving(repository) as hub:
        done = open_in_process(
            hub.address,
            tmp_path / "cache",
            *("owner/name", "owner/name/model.safetensors", "owner/name/other.safetensors"),
            *("owner/none", "nothing"),
            tokenizer=str(clip_folder),
        )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("owner/name sd1 ")
    assert lines[1].startswith("owner/name/model sd1 ")
    assert lines[2].startswith("ModelFolderError owner/name has no file other.safetensors")
    assert lines[3].startswith("ModelFolderError There is no folder 'owner/none'")
    assert lines[4].startswith("RequestError nothing does not exist")


@pytest.mark.slow
def test_a_dry_run_of_a_hub_id_downloads_no_weights(source: Path, tmp_path: Path) -> None:
    big = np.ones(400_000, np.float16)
    weights = {
        name: source / name for name in (*PLAIN, "unet/diffusion_pytorch_model.non_ema.safetensors")
    }
    for path in weights.values():
        save_file({"weight": big}, path)
    with serving(source) as hub:
        done = look_in_process(hub.address, tmp_path / "cache", "owner/name")
        assert done.returncode == 0, done.stderr
        assert not set(weights) & hub.downloaded()
        assert "unet/config.json" in hub.downloaded()
        assert "owner/name (sd1) would become out, by the recipe int8" in done.stdout
        assert "download: 2.4 MB from the hub" in done.stdout  # three of 0.8 MB
        assert not (tmp_path / "out").exists()

        again = look_in_process(hub.address, tmp_path / "cache", "owner/name", offline="1")
        assert again.returncode != 0
        assert len(again.stderr.strip().splitlines()) == 1

        open_in_process(hub.address, tmp_path / "cache", "owner/name")
        before = set(hub.downloaded())
        whole = look_in_process(hub.address, tmp_path / "cache", "owner/name")
        assert whole.returncode == 0, whole.stderr
        assert "download:" not in whole.stdout
        assert set(hub.downloaded()) == before


@pytest.mark.slow
def test_a_dry_run_looks_at_one_commit(source: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(source, later)
    (later / "model_index.json").write_text("{}")
    cache = tmp_path / "cache"
    with serving(source) as hub:
        hub.commits[LATER] = later
        hub.moves_to = LATER  # as soon as main was listed
        first = look_in_process(hub.address, cache, "owner/name")
        assert first.returncode == 0, first.stderr
        assert "owner/name (sd1)" in first.stdout
        assert hub.main == LATER
        repository = cache / "hub" / "models--owner--name"
        assert [path.name for path in (repository / "snapshots").iterdir()] == [COMMIT]
        # Without its weights the commit is no model to start from offline.
        assert not (repository / "refs").exists()
        hub.main = COMMIT
        open_in_process(hub.address, cache, "owner/name")
        assert (repository / "refs" / "main").read_text() == COMMIT


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_source_over_the_limit_is_not_downloaded(
    options: Sequence[str], source: Path, tmp_path: Path
) -> None:
    words = ["-m", "sdvino", "convert", "owner/name", "out", "--max-download", "30GB", *options]
    with serving(source) as hub:
        hub.told["unet/diffusion_pytorch_model.safetensors"] = 31 * 10**9
        over = run_in_process(words, hub.address, tmp_path / "cache")
        assert over.returncode == 2
        assert "would download 31.00 GB, and the limit is 30.00 GB; raise it" in over.stderr
        assert over.stderr.count("\n") == 1
        assert "--max-download 32GB" in over.stderr
        hub.told["unet/diffusion_pytorch_model.safetensors"] = None
        untold = run_in_process(words, hub.address, tmp_path / "cache")
        assert untold.returncode == 2
        assert "does not say how large unet/diffusion_pytorch_model.safetensors" in untold.stderr
        assert not [name for name in hub.sent if name.endswith(".safetensors")]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_of_a_single_file_reads_its_header(clip_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    file = repository / "model.safetensors"
    write(file, shapes_of("sd1"))
    options = ("--tokenizer", str(clip_folder), "--recipe", "int8-weights")
    with serving(repository) as hub:
        there = look_in_process(
            hub.address, tmp_path / "cache", "owner/name/model.safetensors", *options
        )
        assert there.returncode == 0, there.stderr
        assert hub.sent["model.safetensors"] < file.stat().st_size
    here = look_in_process("http://127.0.0.1:1", tmp_path / "cache", str(file), *options)
    assert here.returncode == 0, here.stderr
    steps = [
        [line for line in done.stdout.splitlines() if line.startswith(("  export", "  compress"))]
        for done in (there, here)
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 8
    assert "download:" in there.stdout
    assert "download:" not in here.stdout


def test_outlines_are_the_sources_without_their_weights(
    source: Path, clip_folder: Path, tmp_path: Path
) -> None:
    whole = DiffusersFolder.open(source)
    sizes = {part: whole.bytes_of(part) for part in whole.weights}
    for path in source.rglob("*.safetensors"):
        path.unlink()
    outline = DiffusersFolder.open(source, elsewhere=sizes)
    assert {part: outline.bytes_of(part) for part in sizes} == sizes
    assert (outline.family, outline.components) == (whole.family, whole.components)
    with pytest.raises(RequestError, match="for unet"):
        DiffusersFolder.open(source, elsewhere={**sizes, "unet": 0})

    file = tmp_path / "model.safetensors"
    write(file, shapes_of("sd1"))
    outlined, download = outline_source(file, tmp_path / "a", Told(tokenizer=clip_folder))
    opened = open_source(file, tmp_path / "b", Told(tokenizer=clip_folder))
    assert download == 0
    assert not list((tmp_path / "a").rglob("*.safetensors"))
    assert (outlined.name, outlined.configs) == (opened.name, opened.configs)
    for part in outlined.components.values():
        assert outlined.bytes_of(part) == opened.bytes_of(part) > 0


def test_an_openvino_repository_is_outlined(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "model")
    whole = OpenVinoFolder.open(folder, name="owner/name")
    sizes = {part: whole.bytes_of(part) for part in whole.components}
    for path in folder.rglob("*.bin"):
        path.unlink()
    outline = OpenVinoFolder.outline(folder, name="owner/name", elsewhere=sizes)
    assert outline.family == whole.family
    assert outline.components == whole.components
    assert {part: outline.bytes_of(part) for part in sizes} == sizes
    (folder / "unet" / "openvino_model.xml").unlink()
    with pytest.raises(RequestError, match=r"unet/openvino_model\.xml"):
        OpenVinoFolder.outline(folder, name="owner/name", elsewhere=sizes)
