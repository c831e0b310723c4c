from __future__ import annotations

from pathlib import Path

import pytest
from bench_memory import has_proc
from measure_memory import Phase, PhaseTimings, report, run, take_peak

from sdvino.runtime.timings import clock

pytestmark = pytest.mark.skipif(not has_proc(), reason="reads /proc")
MB = 10**6


def test_each_part_has_a_peak_of_its_own() -> None:
    timings = PhaseTimings()
    take_peak()
    for part, megabytes in (("load", 10), ("text", 120), ("denoise", 10), ("denoise", 10)):
        with clock(timings, part):
            assert bytearray(megabytes * MB)
    assert [phase.name for phase in timings.phases] == ["load", "text", "denoise"]
    load, text, denoise = timings.phases
    assert text.peak > max(load.peak, denoise.peak) + 80 * MB
    assert timings.denoise == denoise.seconds > 0.0


def test_a_report_names_the_highest_peak() -> None:
    phases = [Phase("text", 1.0, 1.0, 250 * MB, 200 * MB), Phase("denoise", 8.0, 6.0, 1500 * MB, 1)]
    plan = {"release_text": True, "release_models": False, "tile": 32, "pieces": 8, "peak": 2e9}
    text = report("low", phases, {"plan": plan, "evaluations": 4, "picture": 7}, 12.0)
    assert "low: release text, tiles of 32, UNet in 8 pieces; estimated 2.00 GB" in text
    assert "12.0 s  processor     7.0 s  peak  1.50 GB" in text
    assert "an evaluation 2.00 s, of the processor 1.50 s; picture 7" in text


@pytest.mark.slow
def test_a_picture_of_the_demo_is_measured(tmp_path: Path) -> None:
    job = {"model": None, "steps": 1, "guidance_scale": 3.0, "size": 128, "threads": 1}
    pictures = []
    for case in ("normal", "low"):
        phases, result = run({**job, "case": case, "cache": str(tmp_path)})
        assert [phase.name for phase in phases] == [
            "start",
            "load for text",
            "text",
            "load for denoise",
            "denoise",
            "load for decode",
            "decode",
            "end",
        ]
        assert all(0 < phase.rest <= phase.peak < 10**9 for phase in phases)
        assert result["plan"]["pieces"] == (1 if case == "normal" else 8)
        pictures.append(result["picture"])
    # Pieces run linear layers as products, which may round 8-bit numbers the other way.
    assert pictures[0] == pytest.approx(pictures[1], rel=1e-3)
