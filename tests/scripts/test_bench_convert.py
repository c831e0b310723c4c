"""The benchmark of conversions: what it counts as memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_convert
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")

MEGABYTE = 10**6
# A child that is gone before the end, beside its parent; it writes to its memory, or it has none.
FAMILY = """
import subprocess, sys, time
child = "x = bytearray(b'1') * {0}; import time; time.sleep(0.5)"
mine = bytearray(b"1") * {0}
subprocess.run([sys.executable, "-c", child], check=True)
open(sys.argv[1] + "/made", "wb").write(b"12345")
"""


def test_memory_is_that_of_all_processes_at_once(tmp_path: Path) -> None:
    script = FAMILY.format(100 * MEGABYTE)
    run = bench_convert.measure("family", [sys.executable, "-c", script, str(tmp_path)], tmp_path)
    assert 200 * MEGABYTE < run.anonymous < run.resident < 300 * MEGABYTE
    assert run.seconds > 0.5
    assert run.output == 5
    assert run.steps == {}


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(SystemExit, match="no such model"):
        bench_convert.measure("failing", command, tmp_path)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["convert", "--gate-minutes", "3"], "gate"),
        (["convert", "--no-gate"], ""),
        (
            ["sdvino.convert.worker", "folder", "export unet", "export vae"],
            "export unet, export vae",
        ),
    ],
)
def test_a_process_is_known_by_its_words(words: list[str], steps: str) -> None:
    program = "import time; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()  # before it runs, its words may not be told yet
        try:
            assert bench_convert.steps_of(running.pid) == steps
        finally:
            running.kill()


def test_a_table_tells_what_was_foreseen() -> None:
    run = bench_convert.Run(
        name="sdvino int8",
        seconds=12.0,
        resident=3 * 10**9,
        anonymous=2 * 10**9,
        output=10**9,
        steps={"calibrate": 2 * 10**9},
        expected={"calibrate": 2_500_000_000},
    )
    lines = bench_convert.table([run]).splitlines()
    assert "| sdvino int8 | 12 | 3.00 | 2.00 | 1.00 |" in lines
    assert "| sdvino int8 | calibrate | 2.00 | 2.50 |" in lines


def test_documents_keep_what_was_measured_of_other_sources(tmp_path: Path) -> None:
    machine = {"cpu": "a processor", "openvino": "2026.4.1"}
    run = bench_convert.Run("sdvino fp16", 12.0, 3 * 10**9, 10**9, 10**9, {"export": 10**9})
    for name, seconds in (("sd15", 12.0), ("sdxl", 90.0), ("sd15", 34.0)):
        runs = [replace(run, seconds=seconds)]
        section = bench_convert.Section(name, f"bench {name}", machine, runs)
        bench_convert.write_documents(tmp_path, section)
    lines = (tmp_path / "conversion.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## sd15", "## sdxl"]
    second_cells = [
        line.split("|")[2].strip() for line in lines if line.startswith("| sdvino fp16 | ")
    ]
    assert second_cells == ["34", "export", "90", "export"]
