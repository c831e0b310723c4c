"""`sdvino generate` and `info` through the real command, on the bundled demo model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvino.cli.main import main
from sdvino.compress.targets import get_target
from sdvino.image.picture import read_record
from sdvino.settings import FAST

PROMPT = "a big red circle on a blue background"
FEW = ("--steps", "2", "-q")


def pixels(path: Path) -> object:
    with Image.open(path) as picture:
        return np.asarray(picture).tolist()


@pytest.mark.slow
def test_a_picture_carries_its_settings_and_can_be_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    options = ["--seed", "5", "--scheduler", "dpmpp_2m", "--cfg-scale", "3", "--noise", "cuda"]
    assert main(["generate", PROMPT, "-o", str(first), *options, *FEW]) == 0
    assert capfd.readouterr().out.strip() == str(first)
    asked = read_record(first).request
    assert (asked.prompts, asked.seed, asked.noise) == ((PROMPT,), 5, "cuda")
    assert (asked.sampler.scheduler, asked.guidance_scale) == ("dpmpp_2m", 3.0)
    assert main(["generate", "--like", str(first), "-o", str(again), "-q"]) == 0
    assert pixels(first) == pixels(again)
    assert main(["generate", "--like", str(first), "-s", "6", "-o", str(other), "-q"]) == 0
    assert pixels(first) != pixels(other)
    capfd.readouterr()
    assert main(["info", str(first)]) == 0
    assert "Seed: 5" in capfd.readouterr().out


@pytest.mark.slow
def test_what_made_a_picture_sooner_is_carried_and_repeated(tmp_path: Path) -> None:
    exact, first, again, undone = (tmp_path / f"{name}.png" for name in "abcd")
    options = ["--seed", "5", "--steps", "3", "-q"]
    assert main(["generate", PROMPT, "-o", str(exact), *options]) == 0
    sooner = ["--fast", "--tiny-vae"]
    assert main(["generate", PROMPT, "-o", str(first), *sooner, *options]) == 0
    speed = read_record(first).request.speed
    assert (speed.guidance_interval, speed.cache_interval) == (FAST.guidance_interval, 2)
    assert speed.tiny_vae
    assert main(["generate", "--like", str(first), "-o", str(again), "-q"]) == 0
    assert pixels(first) == pixels(again) != pixels(exact)
    plain = ["--no-tiny-vae", "--cache-interval", "1", "--token-downsampling", "1"]
    plain += ["--guidance-interval", "0", "1"]
    assert main(["generate", "--like", str(first), "-o", str(undone), *plain, "-q"]) == 0
    assert pixels(undone) == pixels(exact)


@pytest.mark.slow
def test_a_seed_that_was_drawn_is_said_and_repeats(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert main(["generate", PROMPT, "-o", str(first), "--steps", "2"]) == 0
    seed = read_record(first).request.seed
    assert f"seed {seed}" in capfd.readouterr().err
    assert main(["generate", PROMPT, "-o", str(again), "--seed", str(seed), *FEW]) == 0
    assert pixels(first) == pixels(again)


@pytest.mark.slow
def test_nothing_is_overwritten_silently(tmp_path: Path) -> None:
    output = tmp_path / "circle.png"
    for _ in range(2):
        assert main(["generate", PROMPT, "-o", str(output), "--seed", "1", *FEW]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle-2.png", "circle.png"]
    before = pixels(output)
    arguments = ["generate", PROMPT, "-o", str(output), "--seed", "2", "--overwrite", *FEW]
    assert main(arguments) == 0
    assert pixels(output) != before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_several_pictures_of_one_run_stay_apart_even_when_overwriting(tmp_path: Path) -> None:
    output = tmp_path / "circle.png"
    arguments = ["generate", PROMPT, "-n", "3", "-o", str(output), "--seed", "1", "--overwrite"]
    assert main([*arguments, *FEW]) == 0
    seeds = sorted(read_record(path).request.seed or 0 for path in tmp_path.iterdir())
    assert seeds == [1, 2, 3]


@pytest.mark.slow
def test_a_file_of_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "list.txt"
    prompts.write_text("# two of them\na red circle\n\na blue square\n", encoding="utf-8")
    output = tmp_path / "out-%03d.png"
    arguments = ["generate", "--prompts", str(prompts), "-o", str(output), "--seed", "1", *FEW]
    assert main(arguments) == 0
    files = [tmp_path / "out-001.png", tmp_path / "out-002.png"]
    assert capfd.readouterr().out.split() == [str(path) for path in files]
    assert [read_record(path).prompt for path in files] == [
        "a red circle",
        "a blue square",
    ]


@pytest.mark.slow
def test_words_that_do_not_fit_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = PROMPT + " and another" * 60 + " zebra"
    assert main(["generate", text, "-o", str(tmp_path / "o.png"), "--seed", "1", *FEW]) == 0
    assert "zebra" in capfd.readouterr().err


@pytest.mark.slow
def test_metadata_can_be_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "o.jpg"
    assert main(["generate", PROMPT, "-o", str(output), "--no-metadata", *FEW]) == 0
    assert main(["info", str(output)]) == 2
    assert "no settings" in capfd.readouterr().err


@pytest.mark.slow
def test_previews(tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    arguments = ["generate", PROMPT, "-o", str(tmp_path / "o.png"), "--preview", str(preview)]
    assert main([*arguments, *FEW]) == 0
    with Image.open(preview) as picture:
        assert picture.size[0] >= 16


@pytest.mark.slow
@pytest.mark.parametrize("device", ["AUTO", "HETERO:CPU", "unet=CPU"])
def test_devices(device: str, tmp_path: Path) -> None:
    output = tmp_path / "o.png"
    arguments = ["generate", PROMPT, "-o", str(output), "--device", device, "--threads", "1"]
    assert main([*arguments, *FEW]) == 0
    assert output.is_file()


def test_info_of_the_demo_model(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--verify"]) == 0
    out = capfd.readouterr().out
    assert "128 x 128" in out
    assert "made for: avx2\n" in out
    assert "unet" in out


def test_devices_lists_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    out = capfd.readouterr().out
    assert "CPU" in out
    assert "memory" in out
    assert "rewrites of the UNet: " in out
    assert f"--target {get_target('auto').name} " in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sdvino", "generate", PROMPT, "--steps", "900"),
            *("-W", "256", "-H", "256", "-o", str(tmp_path / "o.png")),
            *("--preview", str(tmp_path / "preview.png")),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "preview.png").exists():  # the loop is running
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "nothing was left half-written" in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        "from sdvino.cli.main import main;"
        f"sys.exit(main(['generate', 'a red circle', '--steps', '1', '-o', r'{tmp_path}/o.png',"
        " '--no-cache']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
