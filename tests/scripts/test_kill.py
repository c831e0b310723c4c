"""What is left after kills: the checks find what they are to find, and a few real kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("needs /proc", allow_module_level=True)

import kill
import kill_runs
import make_synthetic
from kill_runs import Found
from PIL import Image

from tests.tiny_folder import make_tiny_folder


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


FILES = {"sdvino.json": b"{}", "unet/openvino_model.xml": b"<net>", "unet/openvino_model.bin": b"1"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"unet/openvino_model.xml": b"<net >"}, ["unet/openvino_model.xml differs"]),
        ({"sdvino.json": None}, ["sdvino.json is missing"]),
        ({"unet/new": b""}, ["unet/new is too many"]),
    ],
    ids=["the same", "another byte", "one less", "one more"],
)
def test_folders_are_compared_file_by_file(
    changed: dict[str, bytes | None], expected: list[str], tmp_path: Path
) -> None:
    one = write(tmp_path / "one", FILES)
    files = {name: content for name, content in (FILES | changed).items() if content is not None}
    other = write(tmp_path / "other", files)
    assert kill_runs.differences(kill_runs.digests(one), kill_runs.digests(other)) == expected


def test_whatever_stands_beside_a_target_is_found(tmp_path: Path) -> None:
    target = write(tmp_path / "model", FILES)
    assert kill_runs.beside(target) == []
    write(tmp_path / ".model.sdvino-partial", {"state.json": b"{}"})
    (tmp_path / "x.tmp").touch()
    assert kill_runs.beside(target) == [".model.sdvino-partial", "x.tmp"]


def test_what_was_never_finished_is_found(tmp_path: Path) -> None:
    write(tmp_path, {"a0/checksums.json": b"{}", "a0/1.blob": b"1"})
    assert kill_runs.unfinished(tmp_path) == []
    write(tmp_path, {".writing-x/1.blob": b"1", "profile.json.tmp": b"", ".0f.tmp": b""})
    assert kill_runs.unfinished(tmp_path) == [".0f.tmp", ".writing-x", "profile.json.tmp"]


def test_pictures_must_be_whole_and_the_right_ones(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "out.png")
    expected = kill_runs.digests(tmp_path)
    assert kill_runs.not_whole(tmp_path, expected) == []
    content = (tmp_path / "out.png").read_bytes()
    (tmp_path / "out-2.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(255 - pixels).save(tmp_path / "out-3.png")
    (tmp_path / ".0f.tmp").touch()
    cut, other = kill_runs.not_whole(tmp_path, expected)
    assert cut.startswith("out-2.png is no whole picture")
    assert other == "out-3.png is another picture"


@pytest.mark.parametrize(
    ("number", "status", "said", "good"),
    [
        (kill_runs.KILL, -9, "", True),
        (kill_runs.KILL, 1, "sdvino: The disk is full.", False),
        (signal.SIGTERM, 130, "sdvino: Cancelled.", True),
        (signal.SIGTERM, 0, "", True),
        (signal.SIGTERM, -15, "", False),
        (signal.SIGTERM, None, "", False),
        (signal.SIGTERM, 130, "", False),
        (signal.SIGTERM, 130, "Traceback (most recent call last):\nsdvino: Cancelled.", False),
    ],
)
def test_how_a_killed_run_must_end(
    number: signal.Signals, status: int | None, said: str, good: bool
) -> None:
    assert kill_runs.is_good_end(status, said, number) == good


def test_the_phase_of_a_conversion_is_read_from_its_folder(tmp_path: Path) -> None:
    target, steps = tmp_path / "model", ["metadata", "export unet"]
    work = tmp_path / ".model.sdvino-partial"

    def phase(since: float = 0.0) -> str:
        return kill.conversion_phase(target, steps, since)

    assert phase() == "start"
    write(work, {"state.json": b'{"steps": {"metadata": {}}}'})
    assert phase() == "start"
    (work / "tmp" / "export-unet").mkdir(parents=True)
    assert phase() == "export unet"
    assert phase(since=time.time() + 60) == "start"  # of a run before
    write(work, {"state.json": b'{"steps": {"metadata": {}, "export unet": {}}}'})
    assert phase() == "end"


def test_moments_are_spread_over_time_and_over_phases() -> None:
    rng = random.Random(0)
    phases = {"start": 10.0, "short": 0.1, "long": 30.0}
    found = [kill_runs.choose_moment(phases, rng) for _ in range(2_000)]
    counts = {name: sum(phase == name for phase, _ in found) for name in phases}
    assert counts["short"] > 200
    assert counts["long"] > counts["start"] > counts["short"]
    assert all(0.0 <= offset <= phases[phase] for phase, offset in found)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_process_that_outlives_its_parent_is_found_and_ended() -> None:
    environment = {**os.environ, kill_runs.MARK: "of this test"}
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment
    ) as process:
        while kill_runs.marked("of this test") != [process.pid]:
            time.sleep(0.01)
        assert kill_runs.marked("of another") == []
        kill_runs.end_all([process.pid])
        assert process.wait() == -kill_runs.KILL
    assert kill_runs.marked("of this test") == []


def test_the_table_says_where_and_what() -> None:
    found = Found()
    found.kills.update({("start", "SIGKILL"): 2, ("export unet", "SIGTERM"): 1})
    found.note_differences(["a differs", "b is missing"], "conversion 1")
    found.note_left([".x.tmp"], "beside conversion 1")
    text = kill.table("conversions", found)
    for line in ("| start | 2 | 0 |", "| export unet | 0 | 1 |", "| kills | 3 |"):
        assert line in text
    for line in ("| differed from undisturbed | 1 |", "| left where nothing may be | 1 |"):
        assert line in text
    assert found.wrong[0] == "conversion 1: a differs"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_few_real_kills_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a source of a few nodes: what takes time is starting."""
    source = make_tiny_folder(tmp_path / "tiny")
    shutil.rmtree(source / "tokenizer")
    make_synthetic.write_tokenizer(source / "tokenizer", make_synthetic.EOS)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["--source", str(source), "--convert", "2", "--model", str(source), "--generate", "4"]
    words += ["--scratch", str(scratch)]
    assert kill.main(words) == 0, capsys.readouterr().out
    assert list(scratch.iterdir()) == []
