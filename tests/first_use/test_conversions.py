"""Checkpoints in miniature given to -m: converted once by the real command, killed, found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_synthetic
import numpy as np
import pytest
import synthetic_architectures
from original_naming import original_state
from PIL import Image

from tests.conftest import ROOT, SHAPES_SOURCE
from tests.convert.checkpoint_architectures import CHECKPOINTS
from tests.folder.test_hub import run_in_process
from tests.hub_server import serving

pytestmark = pytest.mark.slow

RECIPE = ("--recipe", "fp16")
#: Said when something is converted.
CONVERTED = "is converted once"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x in miniature, as a single file in the original naming."""
    from safetensors.torch import load_file, save_file

    base = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic_architectures.ARCHITECTURES, "sd1", CHECKPOINTS["sd1"])
        make_synthetic.make("sd1", base / "source")

    def load(folder: Path) -> dict[str, Any]:
        return dict(load_file(next(folder.glob("*.safetensors"))))

    state = original_state(base / "source", CHECKPOINTS["sd1"], load)
    file = base / "dream.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
    return file


def begin(cache: Path, *words: str) -> subprocess.Popen[str]:
    """Begin the real command, with its own cache."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdvino", *words],
        env={**os.environ, "SDVINO_CACHE_DIR": str(cache)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with begin(cache, *words) as process:
        out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def drawing(model: Path, picture: Path) -> list[str]:
    size = ["-W", "128", "-H", "128", "--steps", "1", "--seed", "7"]
    return ["generate", "a circle", "-m", str(model), *RECIPE, "-o", str(picture), *size]


def models(cache: Path) -> list[dict[str, Any]]:
    """Return what `sdvino models` lists beside the bundled one and what the hub's cache holds."""
    done = command(cache, "models", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["models"]
    return [model for model in found if model["kind"] in ("converted", "interrupted")]


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while not what():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.05)


def exported(cache: Path) -> bool:
    """Tell whether a step that takes time is finished."""
    states = (cache / "converted").glob("*/.model.sdvino-partial/state.json")
    return any('"export ' in path.read_text() for path in states)


def pixels(path: Path) -> object:
    with Image.open(path) as picture:
        return np.asarray(picture).tolist()


def test_killed_it_goes_on_and_two_at_once_convert_once(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with begin(cache, *drawing(checkpoint, tmp_path / "none.png")) as first:
        wait_for(lambda: exported(cache), first)
        first.kill()
        assert CONVERTED in first.communicate()[1]
    (model,) = models(cache)
    assert (model["kind"], model["name"]) == ("interrupted", "dream-fp16")
    time.sleep(2)  # its worker ends by itself

    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    runs = [begin(cache, *drawing(checkpoint, picture)) for picture in pictures]
    done = [(process.communicate(timeout=600), process.returncode) for process in runs]
    said = [err for (_, err), _ in done]
    assert [status for _, status in done] == [0, 0], said
    assert sum(CONVERTED in err for err in said) == 1
    assert sum("waiting until it is done" in err for err in said) == 1
    assert sum("Continuing an interrupted conversion" in err for err in said) == 1
    assert pixels(pictures[0]) == pixels(pictures[1])

    (model,) = models(cache)
    assert (model["kind"], model["name"], model["recipe"]) == ("converted", "dream-fp16", "fp16")
    assert model["compared"] is False
    moved = checkpoint.rename(tmp_path / "called-otherwise.safetensors")
    again = command(cache, *drawing(moved, tmp_path / "c.png"))
    shutil.move(moved, checkpoint)
    assert again.returncode == 0, again.stderr
    assert CONVERTED not in again.stderr
    assert pixels(tmp_path / "c.png") == pixels(pictures[0])
    assert [found["path"] for found in models(cache)] == [model["path"]]

    # A part of it is gone: it is made again.
    (Path(model["path"]) / "unet" / "openvino_model.bin").unlink()
    mended = command(cache, *drawing(checkpoint, tmp_path / "d.png"))
    assert mended.returncode == 0, mended.stderr
    assert CONVERTED in mended.stderr
    assert pixels(tmp_path / "d.png") == pixels(pictures[0])


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_keeps_what_is_finished_and_models_removes_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with begin(cache, *drawing(SHAPES_SOURCE, tmp_path / "none.png")) as process:
        wait_for(lambda: exported(cache), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in err
    (model,) = models(cache)
    assert model["kind"] == "interrupted"
    removed = command(cache, "models", "--remove", model["name"])
    assert removed.returncode == 0, removed.stderr
    assert removed.stdout.startswith(f"removed {model['name']}: ")
    assert models(cache) == []


PIPELINE = """
import sys
from sdvino import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("owner/name", recipe="fp16", profile=False)
print(pipe.folder.name, pipe.folder.path)
"""


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDVINO_CACHE_DIR", str(tmp_path / "cache"))
    cache = tmp_path / "hub"
    with serving(SHAPES_SOURCE) as hub:
        first = run_in_process(["-c", PIPELINE], hub.address, cache)
        assert CONVERTED in first.stderr
        assert "are downloaded" in first.stderr
        assert first.stdout.startswith("owner/name ")
        assert "unet/diffusion_pytorch_model.safetensors" in hub.downloaded()
        # Known by its commit: nothing is downloaded again, though nothing is there.
        shutil.rmtree(cache)
        hub.seen.clear()
        again = run_in_process(["-c", PIPELINE], hub.address, cache)
        assert again.stdout == first.stdout
        assert CONVERTED not in again.stderr
        assert hub.downloaded() <= {""}  # which is the listing
    for offline in ("0", "1"):  # the hub is gone, and nothing of it is here
        gone = run_in_process(["-c", PIPELINE], hub.address, cache, offline)
        assert gone.stdout == first.stdout
    listed = run_in_process(["-m", "sdvino", "models"], hub.address, cache)
    assert "owner/name-fp16" in listed.stdout
