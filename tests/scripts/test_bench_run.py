"""The benchmarks from end to end, with the demo model in fresh processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bench_growth
import bench_peers
import pytest
from bench_growth import Point, describe, plan
from bench_machine import choose_isa
from bench_tables import COLD, EVALUATION, PEAK, PICTURE, WARM, fit_growth

from sdvino.runtime.topology import read_cpu


@pytest.mark.slow
def test_sdvino_and_genai_side_by_side(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The demo model stands where bench_prepare.py would put a converted one of each."""
    isa = choose_isa("native", read_cpu().isa).name
    work, docs = tmp_path / "work", tmp_path / "docs"
    for format_ in (f"sdvino-{isa}", "weights8"):
        shutil.copytree(shapes, work / "tiny-sd15" / format_)
    command = ["--work", str(work), "--cases", "tiny-4", "--peers", "openvino-genai"]
    command += ["--runs", "2", "--no-limit", "--output", str(docs)]
    assert bench_peers.main(command) == 0
    printed = capfd.readouterr()
    assert "4/4" in printed.err
    rows = json.loads((docs / "performance.json").read_text(encoding="utf-8"))
    found = {row["metric"]: row for row in rows}
    assert {PICTURE, EVALUATION, PEAK, COLD, WARM} <= found.keys()
    for row in rows:
        assert (row["case"], row["isa"]) == ("tiny-4", isa)
        assert row["sdvino"] > 0
        assert row["peers"]["openvino-genai"] > 0
    # Torch is in neither process.
    assert 50e6 < found[PEAK]["sdvino"] < 2e9
    text = (docs / "performance.md").read_text(encoding="utf-8")
    assert "| openvino-genai | " in text
    journal = (work / "journal.jsonl").read_bytes()
    assert bench_peers.main(command) == 0  # everything is there
    assert (work / "journal.jsonl").read_bytes() == journal
    assert "run 1" not in capfd.readouterr().err


def test_wrong_requests(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["--work", str(tmp_path)]
    for wrong, said in (
        (["--quick"], "--prepare"),
        (["--cases", "sd3"], "sd15-4"),
        (["--peers", "nobody"], "openvino-genai"),
        (["--runs", "0"], "--runs"),
        (["--most-minutes", "nan"], "--most-minutes"),
        (["--source", f"sd15={tmp_path}"], "no diffusers folder"),
    ):
        assert bench_peers.main([*base, *wrong]) == 2
        message = capfd.readouterr().err
        assert said in message
        assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_each_axis_varies_alone() -> None:
    points = plan(Point(1, 512, 4), {"pictures": [4, 1], "size": [256, 512]})
    assert points["pictures"] == [Point(1, 512, 4), Point(4, 512, 4)]
    assert points["size"] == [Point(1, 256, 4), Point(1, 512, 4)]
    line = fit_growth([(1, 3.0), (2, 5.0)])
    assert describe("steps", line).endswith("1.00 s + 2.00 s a step")
    assert "a pixel" not in describe("size", line)


@pytest.mark.slow
def test_growth_of_the_demo_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--work", str(tmp_path), "--axes", "pictures", "--pictures", "1,3", "--at", "64,2"]
    assert bench_growth.main([*command, "--output", str(tmp_path / "docs")]) == 0
    assert "time ~ pictures^" in capfd.readouterr().out
    value = json.loads((tmp_path / "docs" / "growth.json").read_text(encoding="utf-8"))
    assert [point["pictures"] for point in value["points"]] == [1, 3]
    assert all(point["seconds"] > 0 and point["peak"] > 50e6 for point in value["points"])
    assert (tmp_path / "docs" / "growth.png").read_bytes().startswith(b"\x89PNG")
