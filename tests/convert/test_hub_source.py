from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdvino.convert.hub_source import choose_files, is_hub_source, split_file
from sdvino.errors import ModelFolderError
from tests.convert.mini_checkpoint import shapes_of, write
from tests.hub_server import serving

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


OPEN = """
import sys
from pathlib import Path
from sdvino.convert.open_source import open_source
from sdvino.errors import SdvinoError
for source in sys.argv[3:]:
    try:
        tokenizer = Path(sys.argv[2]) if sys.argv[2] else None
        found = open_source(source, Path(sys.argv[1]), tokenizer=tokenizer)
        print(found.name, found.family.name, found.path)
    except SdvinoError as error:
        print(type(error).__name__, error)
"""


def open_in_process(
    hub: str, cache: Path, *sources: str, tokenizer: str = "", offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Open ``sources`` in a new process: huggingface_hub reads its settings when imported."""
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
        [sys.executable, "-c", OPEN, str(cache / "work"), tokenizer, *sources],
        env={**inherited, **own},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )


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


def test_a_single_file_on_the_hub_is_unpacked(clip_folder: Path, tmp_path: Path) -> None:
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
