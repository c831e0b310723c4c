from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.hub import bundled_model, resolve_model
from sdvino.model_folder import ModelFolder
from tests.hub_server import COMMIT, serving
from tests.tiny_folder import make_tiny_folder

ROOT = Path(__file__).resolve().parent.parent


def fail_on_report(message: str) -> None:
    raise AssertionError(message)


def hub_cache(cache: Path, *, commit: str = COMMIT, ref: str = "main") -> Path:
    """Write a model as huggingface_hub keeps it where links cannot be made, and return it."""
    repository = cache / "models--owner--name"
    folder = make_tiny_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / ref).write_text(commit)
    return folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path / "none") == tmp_path / "none"


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "name",
    ["none", "a/b/c", "../up", "/nowhere/at/all", "a b/c", "owner/", "x" * 5000, "", "a/..b"],
)
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ModelFolderError, match="hub id") as caught:
        resolve_model(name, progress=fail_on_report)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("revision", ["../../etc", "", "a//b", "-x", "a b"])
def test_what_is_no_revision(revision: str) -> None:
    with pytest.raises(RequestError, match="revision"):
        resolve_model("owner/name", revision=revision)


def test_the_bundled_model_is_the_default() -> None:
    assert resolve_model(None) == bundled_model()
    assert bundled_model().parts[-2:] == ("models", "shapes")


def test_offline_the_cache_answers(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path)
    found = resolve_model("owner/name", cache_dir=tmp_path, offline=True, progress=fail_on_report)
    assert found == folder
    (folder / "sdvino.json").unlink()
    assert ModelFolder.open(found).name == "owner/name"
    assert resolve_model("owner/name", cache_dir=tmp_path, offline=True, revision=COMMIT) == folder


def test_offline_without_a_download(tmp_path: Path) -> None:
    with pytest.raises(SdvinoError, match="owner/name was not downloaded before"):
        resolve_model("owner/name", cache_dir=tmp_path, offline=True)
    hub_cache(tmp_path)
    with pytest.raises(SdvinoError, match="revision other"):
        resolve_model("owner/name", cache_dir=tmp_path, offline=True, revision="other")


def test_offline_with_a_download_that_holds_torch_weights(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path)
    (folder / "unet" / "openvino_model.xml").unlink()
    (folder / "unet" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="sdvino convert"):
        resolve_model("owner/name", cache_dir=tmp_path, offline=True)


RESOLVE = """
import sys
from sdvino.errors import SdvinoError
from sdvino.hub import resolve_model
for word in sys.argv[1:]:
    model, _, revision = word.partition("@")
    try:
        print(resolve_model(model, revision=revision if revision else None))
    except SdvinoError as error:
        print(type(error).__name__, error)
"""


def resolve_in_process(
    hub: str, cache: Path, *models: str, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Resolve ``models`` in a new process: huggingface_hub reads its settings when imported."""
    own = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, *(models if models else ["owner/name"])],
        env={**inherited, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def repository(folder: Path) -> Path:
    """Make what a repository may hold beside a model that runs."""
    make_tiny_folder(folder)
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/model.safetensors"):
        (folder / name).write_bytes(b"\0" * 100)
    (folder / "pipeline.py").write_text("raise SystemExit")
    # More than twice what huggingface_hub writes at a time (10 MB), so that half can be kept.
    (folder / "unet" / "openvino_model.bin").write_bytes(
        (folder / "unet" / "openvino_model.bin").read_bytes() + b"\0" * 24_000_000
    )
    return folder


@pytest.mark.slow
def test_a_download_and_what_follows(tmp_path: Path) -> None:
    folder, cache = repository(tmp_path / "repository"), tmp_path / "cache"
    with serving(folder) as hub:
        hub.cut_once.add("unet/openvino_model.bin")
        first = resolve_in_process(hub.address, cache)
        assert "Downloading owner/name: 13 files, 24.1 MB" in first.stderr
        model = ModelFolder.open(first.stdout.strip())
        model_files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
        refused = {"unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/model.safetensors"}
        assert hub.downloaded() - {""} == model_files - refused - {"pipeline.py"}
        # The connection broke in the middle of the weights, and only the rest was fetched again.
        ranges = [r for _, path, r in hub.seen if path.endswith("unet/openvino_model.bin") and r]
        assert any(not r.startswith("bytes=0-") for r in ranges), ranges
        size = (folder / "unet" / "openvino_model.bin").stat().st_size
        assert model.components["unet"].bin.stat().st_size == size

        hub.seen.clear()
        again = resolve_in_process(hub.address, cache)
        assert again.stdout == first.stdout
        assert "Downloading" not in again.stderr
        assert not [path for _, path, _ in hub.seen if "/resolve/" in path]
        offline = resolve_in_process(hub.address, cache, offline="1")
        assert offline.stdout == first.stdout
        address = hub.address
    gone = resolve_in_process(address, cache)
    assert gone.stdout == first.stdout
    assert "using the copy" in gone.stderr


def test_what_the_hub_refuses(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repository")
    (folder / "unet" / "openvino_model.xml").unlink()
    models = ("owner/name", "owner/other", "owner/name@none")
    with serving(folder) as hub:
        answers = resolve_in_process(hub.address, tmp_path / "cache", *models).stdout.splitlines()
        address = hub.address
    assert len(answers) == 3
    assert answers[0].startswith("ModelFolderError owner/name holds torch weights")
    assert answers[1].startswith("ModelFolderError There is no folder 'owner/other'")
    assert answers[2].startswith("ModelFolderError owner/name has no revision 'none'")
    unreachable = resolve_in_process(address, tmp_path / "cache").stdout
    assert unreachable.startswith("SdvinoError The hub cannot be reached")
