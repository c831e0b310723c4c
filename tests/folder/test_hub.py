from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.folder.hub import bundled_model, resolve_model
from sdvino.folder.hub_files import MAX_FILES, _is_file_name
from sdvino.folder.index import ModelFolder
from tests.hub_server import COMMIT, LATER, Hub, serving
from tests.tiny_folder import make_tiny_folder

ROOT = Path(__file__).resolve().parents[2]


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
    ["none", "a/b/c", "../up", "/nowhere/at/all", "a b/c", "owner/", "x" * 250, "", "a/..b"],
)
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ModelFolderError, match="hub id") as caught:
        resolve_model(name, report=fail_on_report)
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
    found = resolve_model("owner/name", cache_dir=tmp_path, offline=True, report=fail_on_report)
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
from sdvino.folder.hub import resolve_model
limit = int(sys.argv[1]) if sys.argv[1] else None
for word in sys.argv[2:]:
    model, _, revision = word.partition("@")
    try:
        print(resolve_model(model, revision=revision if revision else None, max_download=limit))
    except SdvinoError as error:
        print(type(error).__name__, error)
"""


def resolve_in_process(
    hub: str, cache: Path, *models: str, offline: str = "0", max_download: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Resolve ``models`` in a new process: huggingface_hub reads its settings when imported."""
    limit = "" if max_download is None else str(max_download)
    words = ["-c", RESOLVE, limit, *(models if models else ["owner/name"])]
    return run_in_process(words, hub, cache, offline)


def run_in_process(
    words: Sequence[str], hub: str, cache: Path, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run Python, with ``hub`` as the hub and ``cache`` as what was downloaded from it."""
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
        [sys.executable, *words],
        env={**inherited, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=words[0] == "-c",
    )


def repository(folder: Path) -> Path:
    """Make what a repository may hold beside a model that runs."""
    make_tiny_folder(folder)
    manifest = json.loads((folder / "sdvino.json").read_text())
    manifest["components"]["unet"]["bytes"] += 24_000_000
    (folder / "sdvino.json").write_text(json.dumps(manifest))
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
    assert answers[0].startswith("NotConverted owner/name holds torch weights")
    assert answers[1].startswith("ModelFolderError There is no folder 'owner/other'")
    assert answers[2].startswith("ModelFolderError owner/name has no revision 'none'")
    unreachable = resolve_in_process(address, tmp_path / "cache").stdout
    assert unreachable.startswith("NotDownloaded The hub cannot be reached")


def snapshot(cache: Path, commit: str) -> Path:
    return cache / "hub" / "models--owner--name" / "snapshots" / commit


def ref(cache: Path, revision: str = "main") -> str:
    return (cache / "hub" / "models--owner--name" / "refs" / revision).read_text()


def blobs(cache: Path) -> list[Path]:
    return list((cache / "hub" / "models--owner--name" / "blobs").glob("*"))


def later_commit(hub: Hub, folder: Path) -> Path:
    """Make a commit in which every configuration and the graph's weights differ."""
    make_tiny_folder(folder)
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text() + "\n")
    weights = folder / "unet" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes() + b"later")
    hub.commits[LATER] = folder
    return folder


def weights_sent(hub: Hub) -> int:
    return sum(sent for name, sent in hub.sent.items() if name.endswith(".bin"))


def test_the_commit_that_was_listed_is_downloaded(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    with serving(folder) as hub:
        later_commit(hub, tmp_path / "later")
        hub.moves_to = LATER  # as soon as main was listed
        found = resolve_in_process(hub.address, cache).stdout.strip()
        assert found == str(snapshot(cache, COMMIT))
        came = {f.relative_to(found).as_posix() for f in Path(found).rglob("*") if f.is_file()}
        assert len(came) == 13
        for name in came:
            assert (Path(found) / name).read_bytes() == (folder / name).read_bytes(), name
        assert hub.main == LATER
        assert not snapshot(cache, LATER).exists()
        assert ref(cache) == COMMIT
        offline = resolve_in_process(hub.address, cache, "owner/name@main", offline="1")
        assert offline.stdout.strip() == found
        # The next start finds the branch where it is now.
        moved = resolve_in_process(hub.address, cache).stdout.strip()
        assert moved == str(snapshot(cache, LATER))
        assert ref(cache) == LATER
        assert [*(cache / "hub" / "models--owner--name" / "refs").iterdir()] == [
            cache / "hub" / "models--owner--name" / "refs" / "main"
        ]


@pytest.mark.slow
def test_a_commit_that_cannot_be_had_leaves_the_one_before(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    with serving(folder) as hub:
        first = resolve_in_process(hub.address, cache).stdout
        later_commit(hub, tmp_path / "later")
        hub.main = LATER
        hub.broken.add("unet/openvino_model.bin")
        again = resolve_in_process(hub.address, cache)
        assert again.stdout == first
        assert "using the copy" in again.stderr
        assert resolve_in_process(hub.address, cache, offline="1").stdout == first
        by_commit = resolve_in_process(hub.address, cache, f"owner/name@{LATER}")
        assert by_commit.stdout.startswith("NotDownloaded The hub cannot be reached")
        hub.broken.clear()
        by_commit = resolve_in_process(hub.address, cache, f"owner/name@{LATER}")
        assert by_commit.stdout.strip() == str(snapshot(cache, LATER))
        assert ref(cache) == COMMIT


@pytest.mark.slow
def test_a_limit_to_what_is_downloaded(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with serving(folder) as hub:
        over = resolve_in_process(hub.address, cache, max_download=size - 1).stdout
        assert over.startswith("RequestError owner/name would download 0.")
        assert "--max-download" in over
        none = resolve_in_process(hub.address, cache, max_download=0).stdout
        assert none.startswith("RequestError The download limit is 0")
        hub.told["unet/openvino_model.bin"] = 40 * 10**9
        default = resolve_in_process(hub.address, cache).stdout
        assert "would download 40.00 GB, and the limit is 32.00 GB; raise it with" in default
        assert "--max-download 41GB" in default
        hub.told["unet/openvino_model.bin"] = 10**18
        full = resolve_in_process(hub.address, cache, max_download=2 * 10**18).stdout
        assert full.startswith("OutputError owner/name needs 1000000000.00 GB on the disk")
        assert not weights_sent(hub)
        assert not blobs(cache)
        hub.told.clear()
        assert resolve_in_process(hub.address, cache, max_download=size).stdout.startswith("/")
        # What is here already counts no more.
        assert resolve_in_process(hub.address, cache, max_download=1).stdout.startswith("/")


@pytest.mark.parametrize(
    "command", ["generate", *(pytest.param(c, marks=pytest.mark.slow) for c in ("tune", "bench"))]
)
def test_the_limit_on_the_command_line(command: str, tmp_path: Path) -> None:
    words = ["-m", "sdvino", command, "-m", "owner/name", *["a"][: command == "generate"]]
    with serving(make_tiny_folder(tmp_path / "repository")) as hub:
        hub.told["unet/openvino_model.bin"] = 31 * 10**9
        words += ["--max-download", "30 GB"]
        done = run_in_process(words, hub.address, tmp_path / "cache")
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("sdvino: owner/name would download 31.00 GB")
        assert done.stderr.count("\n") == 1
        wrong = run_in_process([*words[:-1], "much"], hub.address, tmp_path / "cache")
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("sdvino: --max-download is 'much'; give bytes")
        assert not weights_sent(hub)


def test_sizes_that_are_not_told(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    untold: list[Any] = [None, -1, 1.5, "9", True, [], 10**40]
    with serving(folder) as hub:
        for size in untold:
            siblings = [{"rfilename": "unet/openvino_model.xml", "size": size}]
            hub.listings.append({"siblings": siblings})
        answers = resolve_in_process(hub.address, cache, *["owner/name"] * len(untold)).stdout
        assert answers.count("RequestError The hub does not say how large unet/openv") == len(
            untold
        )
        assert not hub.sent
        hub.told |= {"model_index.json": None, "unet/config.json": -5}
        assert resolve_in_process(hub.address, cache).stdout.startswith("/")


def test_listings_that_are_none(tmp_path: Path) -> None:
    strange: list[Any] = [
        b"[" * 200_000,
        b"\xff",
        [],
        7,
        {"siblings": 7},
        {"siblings": [7]},
        {"siblings": [{"size": 1}]},
        {"siblings": [{"rfilename": "a", "lfs": {"size": "?"}}]},
        {"siblings": [{"rfilename": 7, "size": 1}]},
        {"siblings": None},
        {"siblings": [{"rfilename": "a", "size": 1}] * (MAX_FILES + 1)},
        {"sha": None},
        {"sha": 7},
        {"sha": "../../elsewhere"},
        {"sha": COMMIT + "\n"},
        {"lastModified": "yesterday"},
    ]
    with serving(make_tiny_folder(tmp_path / "repository")) as hub:
        hub.listings = list(strange)
        done = resolve_in_process(
            hub.address, tmp_path / "cache", *["owner/name"] * len(strange), f"owner/name@{COMMIT}"
        )
        hub.listings = [b"<html>", {"sha": LATER}]
        page = resolve_in_process(hub.address, tmp_path / "cache")
        other = resolve_in_process(hub.address, tmp_path / "cache", f"owner/name@{COMMIT}").stdout
    answers = done.stdout.splitlines()
    assert len(answers) == len(strange) + 1
    for answer, listing in zip(answers, strange, strict=False):
        # Of bytes that are no text, versions of huggingface_hub think differently.
        sentence = answer.startswith(("ModelFolderError ", "NotDownloaded The hub cannot"))
        assert sentence, (answer, str(listing)[:80])
        assert len(answer) < 300
    assert "has 10001 files" in answers[10]
    assert answers[-1].startswith("/")
    assert page.stdout.startswith("NotDownloaded The hub cannot be reached")
    assert "is about another commit" in other


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("unet/openvino_model.bin", True),
        ("Modell für Bilder (1).safetensors", True),
        ("模型.safetensors", True),
        ("", False),
        ("/etc/passwd", False),
        ("../up", False),
        ("a/../b", False),
        ("a//b", False),
        ("a/", False),
        ("./a", False),
        ("a\\b", False),
        ("C:/a", False),
        ("a\0b", False),
        ("a\x1b[2Jb", False),
        ("a\u202eb", False),
        ("a\ud800b", False),
        ("a" * 256, False),
        ("ä" * 128, False),
        ("a/" * 501 + "a", False),
        (7, False),
        (None, False),
    ],
)
def test_names_of_files(name: object, good: bool) -> None:
    assert _is_file_name(name) is good


def test_absurd_names_are_passed_over(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    with serving(folder) as hub:
        files = [f for f in folder.rglob("*") if f.is_file()]
        siblings: list[dict[str, Any]] = [
            {"rfilename": f.relative_to(folder).as_posix(), "size": f.stat().st_size} for f in files
        ]
        for name in (
            "../../../up.json",
            "/etc/passwd",
            "tokenizer/\x1b[2J.json",
            "a\\b",
            "x" * 9999,
        ):
            siblings += [{"rfilename": name, "size": 1}]
        hub.listings = [{"siblings": siblings}]
        found = resolve_in_process(hub.address, cache).stdout.strip()
        assert ModelFolder.open(Path(found)).name == "tiny"
        assert not [name for name in hub.downloaded() if ".." in name or "\x1b" in name]


def test_another_size_than_was_told_is_removed(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    weights = "unet/openvino_model.bin"
    with serving(folder) as hub:
        hub.told[weights] = (folder / weights).stat().st_size + 1
        answer = resolve_in_process(hub.address, cache).stdout
        assert answer.startswith("ModelFolderError What the hub says of owner/name is not so")
        assert weights in answer
        assert not (snapshot(cache, COMMIT) / weights).exists()
        assert not (cache / "hub" / "models--owner--name" / "refs" / "main").exists()
        hub.told.clear()
        found = resolve_in_process(hub.address, cache).stdout.strip()
        assert (Path(found) / weights).read_bytes() == (folder / weights).read_bytes()


def test_more_than_was_told_is_not_taken(tmp_path: Path) -> None:
    folder, cache = make_tiny_folder(tmp_path / "repository"), tmp_path / "cache"
    with serving(folder) as hub:
        hub.inflated["unet/openvino_model.bin"] = 400 * 10**6
        answer = resolve_in_process(hub.address, cache).stdout
        assert answer.startswith("ModelFolderError What the hub says of owner/name is not so: more")
        assert hub.sent["unet/openvino_model.bin"] < 200 * 10**6
        assert sum(blob.stat().st_size for blob in blobs(cache)) < 10**6
