"""`sdvino bench` and `generate --timings`, on the bundled demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdvino.cli.bench import parse_size
from sdvino.cli.main import main
from sdvino.errors import RequestError
from sdvino.runtime.memory import linux_peak, memory_status, peak_memory
from sdvino.runtime.timings import Timings
from sdvino.settings import DeviceSettings, RunSettings
from sdvino.tuning.bench import PARTS, BenchReport, breakdown, with_cache


@pytest.mark.slow
def test_a_machine_gets_its_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--steps", "2", "--guidance-scale", "3", "--size", "64x128", "-n", "2"]
    assert main([*arguments, "--scheduler", "euler", "--json", "-q"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["width"], found["height"], found["steps"]) == (64, 128, 2)
    assert (found["scheduler"], found["pictures"], found["evaluations"]) == ("euler", 2, 4)
    for name in ("load_cold", "load_warm", "text", "evaluation", "decode", "picture"):
        assert found[name] > 0, name
    # Every part is in the picture, and only loading is not.
    assert found["picture"] >= found["evaluation"] * 2
    assert found["model_bytes"] > 10**6
    lines = BenchReport(**found).table().splitlines()
    assert lines[0].startswith("shapes")
    assert any(line.startswith("UNet, one evaluation") and "4 a picture" in line for line in lines)
    uncached = BenchReport(**{**found, "load_warm": None, "peak_memory": None}).table()
    assert uncached.count(" -\n") == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--size", "big"], "512"),
        (["--size", "65"], "multiple of 8"),
        (["-n", "0"], "from 1"),
        (["--steps", "0"], "num_inference_steps"),
        (["-m", "no-such-folder/here/or/there"], "no-such-folder"),
    ],
)
def test_wrong_requests(wrong: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *wrong]) == 2
    printed = capfd.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_sizes() -> None:
    assert parse_size(None) == (None, None)
    assert parse_size("512") == (512, 512)
    assert parse_size(" 768X512 ") == (768, 512)
    for wrong in ("", "512x", "x512", "-8", "8.5", "1x2x3"):
        with pytest.raises(RequestError):
            parse_size(wrong)


@pytest.mark.slow
def test_timings_after_the_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "o.png"
    arguments = ["generate", "a red circle", "-o", str(output), "--steps", "2", "-n", "2", "-q"]
    assert main([*arguments, "--guidance-scale", "1", "--timings"]) == 0
    printed = capfd.readouterr()
    assert len(printed.out.split()) == 2  # the pictures alone
    lines = [line.split() for line in printed.err.splitlines()]
    assert [line[0] for line in lines[:5]] == [*PARTS, "together"]
    assert "4 UNet evaluations" in printed.err
    assert "a picture" in printed.err


def test_a_breakdown_adds_up() -> None:
    timings = Timings(load=1, text=0, denoise=6, decode=3, unet_evaluations=4)
    text = breakdown(timings, pictures=2, peak=2_500_000_000)
    assert "denoise          6.00 s   60%  4 UNet evaluations, 1.500 s each" in text
    assert "10.00 s" in text
    assert "5.00 s a picture" in text
    assert "2.50 GB" in text
    assert "no UNet evaluation" in breakdown(Timings())


def test_every_component_moves_to_the_cache(tmp_path: Path) -> None:
    settings = RunSettings(
        default=DeviceSettings(num_threads=1), components={"vae": DeviceSettings(device="CPU")}
    )
    moved = with_cache(settings, tmp_path)
    assert moved.default == DeviceSettings(num_threads=1, cache_dir=tmp_path)
    assert moved.for_component("vae_decoder").cache_dir == tmp_path


def test_the_peak_of_a_process() -> None:
    assert linux_peak("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n") == 2 * 2**20
    assert linux_peak("Name:\tkthreadd\n") is None
    before = peak_memory()
    assert before is not None
    assert before >= memory_status().own > 0
    code = (
        "from sdvino.runtime.memory import peak_memory; one = peak_memory();"
        "held = b'x' * 80_000_000; print(peak_memory() - one)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 79_000_000
