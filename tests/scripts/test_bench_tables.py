"""The arithmetic of the benchmarks: medians, ratios, tables, fits, limits, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_cases import CONTENDERS, choose_cases
from bench_limit import Limit, Peaks, Work, chain, count, describe, limit_of, measure_peaks
from bench_memory import has_proc, tree, tree_highest
from bench_record import (
    Entry,
    Journal,
    MeasureError,
    Progress,
    as_time,
    make_key,
    seconds_left,
    source_stamp,
    stop,
    watch,
)
from bench_report import Section, keep_sections, read_sections, with_peers_of, write_documents
from bench_tables import (
    COLD,
    EVALUATION,
    METRICS,
    PEAK,
    PICTURE,
    WARM,
    Values,
    as_json,
    fit_growth,
    ratio,
    rows_of,
    summarize,
    table,
)
from bench_worker import Measured, Watch
from graph_coverage import planned_layers

from sdvino.folder.index import ModelFolder

BY_NAME = {metric.name: metric for metric in METRICS}
CASE = choose_cases(["sd15-4"])[0]


def entry(key: str, *, ready: float, picture: float, peak: int = 10**9) -> Entry:
    measured = Measured(
        ready=ready,
        first_picture=ready + picture,
        pictures=(picture,),
        evaluation=picture / 5,
        evaluations=4,
    )
    return Entry(key, ready + 2 * picture, peak, measured)


STARTS = [
    entry("a", ready=30, picture=12),
    entry("b", ready=5, picture=10, peak=3 * 10**9),
    entry("c", ready=7, picture=11, peak=2 * 10**9),
]


def test_medians_and_the_two_kinds_of_start() -> None:
    values = summarize(STARTS, cold=True, disk=1, installed=2)
    assert values[COLD] == 30
    assert values[WARM] == 6
    assert values[PICTURE] == 11
    assert values[EVALUATION] == pytest.approx(2.2)
    assert values[PEAK] == 2 * 10**9
    assert WARM not in summarize(STARTS[:1], cold=True, disk=1, installed=2)
    assert COLD not in summarize(STARTS[1:], cold=False, disk=1, installed=2)


def test_ratios_go_the_way_that_is_said() -> None:
    assert ratio(BY_NAME[PICTURE], 10, 30) == 3  # three times as fast
    assert ratio(BY_NAME[PEAK], 1e9, 4e9) == 0.25  # a quarter of the memory
    assert str(ratio(BY_NAME[PEAK], 1e9, 0)) == "nan"


VALUES: dict[str, Values] = {
    "sdvino": {PICTURE: 10, PEAK: 2e9},
    "optimum-intel": {PICTURE: 40, PEAK: 6e9},
    "openvino-genai": {PICTURE: 35, PEAK: 8e9},
    "optimum-intel full": {PICTURE: 20},
}


def test_sdvino_stands_beside_the_best_of_each_group() -> None:
    rows = rows_of(CASE, "avx2", CONTENDERS, VALUES)
    found = {(row.against, row.metric): row for row in rows}
    assert found["default", PICTURE].ratio == 3.5
    assert found["default", PICTURE].peers == {"optimum-intel": 40, "openvino-genai": 35}
    assert found["default", PEAK].ratio == pytest.approx(1 / 3)
    assert found["best", PICTURE].ratio == 2
    assert set(found) == {("default", PICTURE), ("default", PEAK), ("best", PICTURE)}
    first = as_json(rows)[0]
    assert {"case", "isa", "metric", "sdvino", "peers", "ratio"} <= first.keys()
    assert (
        rows_of(CASE, "avx2", CONTENDERS, {k: v for k, v in VALUES.items() if k != "sdvino"}) == []
    )


def test_the_table_shows_what_was_measured_and_nothing_else() -> None:
    contenders = [c for c in CONTENDERS if c.name in VALUES]
    text = table(contenders, VALUES, rows_of(CASE, "avx2", contenders, VALUES))
    lines = text.splitlines()
    assert len(lines) == 2 + 4 + 2
    assert {line.count("|") for line in lines} == {len(METRICS) + 2}
    assert "| sdvino | 10.0 | - | - | - | 2.00 | - | - |" in lines
    assert "3.50 x as fast" in text
    assert "0.33 x" in text


def test_a_power_and_a_line_are_found_again() -> None:
    fit = fit_growth([(x, 0.5 * x**1.7) for x in (1, 2, 4, 8)])
    assert fit.exponent == pytest.approx(1.7)
    line = fit_growth([(x, 3 + 0.25 * x) for x in (1, 5, 20)])
    assert [line.fixed, line.each] == pytest.approx([3, 0.25])
    with pytest.raises(ValueError, match="two sizes"):
        fit_growth([(1, 2.0), (1, 3.0)])
    with pytest.raises(ValueError, match="positive"):
        fit_growth([(1, 0.0), (2, 3.0)])


def test_time_left() -> None:
    assert seconds_left([], ["a"]) is None
    assert seconds_left([("a", 10), ("a", 20), ("b", 3)], ["a", "b", "c"]) == 15 + 3 + 11
    assert as_time(None) == "time left not known yet"
    assert as_time(40) == "40 s left"
    assert as_time(600) == "10 min left"
    assert as_time(3 * 3600) == "3.0 h left"


def test_progress_skips_what_is_there_already() -> None:
    said: list[str] = []
    progress = Progress(["a", "a", "a"], said.append)
    progress.end(None)
    progress.begin("second")
    progress.end(30)
    progress.begin("third")
    assert said == ["[2/3, time left not known yet] second", "[3/3, 30 s left] third"]


def test_the_limit_of_a_machine() -> None:
    work, peaks = Work(eight_bit=800, float32=100), Peaks(eight_bit=400, float32=100)
    limit = limit_of(work, peaks, seconds=6)
    assert limit == Limit(6, 3, 0.5, 900 / 6 / 400)
    assert "50%" in describe(work, peaks, limit)


@pytest.mark.parametrize("kind", ["Convolution", "MatMul"])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_the_products_that_peaks_are_measured_with(kind: str, eight_bit: bool) -> None:
    model, multiply_adds = chain(kind, eight_bit, size=8)
    layers = planned_layers("unet", model)
    assert sum(layer.multiply_adds for layer in layers) == multiply_adds
    assert all(layer.planned == eight_bit for layer in layers)


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(seconds=0, size=16)
    assert peaks.eight_bit > 0
    assert peaks.float32 > 0


def test_the_demo_unet_is_counted(shapes: Path) -> None:
    folder = ModelFolder.open(shapes)
    small, large = (count(folder, side) for side in (128, 256))
    assert small.eight_bit > small.float32 > 0
    # More than four times: attention grows with the square of the pixels.
    assert large.total > 4 * small.total


def test_getting_ready_holds_what_the_first_evaluation_took_longer() -> None:
    seen, unseen = Watch(), Watch()
    seen.begin(100.0)
    seen.begin(105.0)
    unseen.first_step = (112.0, 2)  # two evaluations, which take 2 s each when all is loaded
    for one in (seen, unseen):
        one.seconds, one.evaluations = 16.0, 8
    assert seen.ready() == 100.0
    assert unseen.ready() == 108.0


def test_a_batch_of_two_is_two_evaluations() -> None:
    watched = Watch()
    forward = watched.wrap(lambda sample, timestep: sample + timestep)
    assert forward(np.zeros((2, 4, 8, 8)), 1).shape == (2, 4, 8, 8)
    assert watched.evaluations == 2
    assert watched.first is not None
    watched.reset()
    assert watched.evaluations == 0


def test_a_journal_outlives_what_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "work" / "journal.jsonl"
    Journal(path).add(STARTS[0])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "half')
    again = Journal(path)
    assert again.entries == {"a": STARTS[0]}
    again.add(STARTS[1])
    assert Journal(path).entries == {"a": STARTS[0], "b": STARTS[1]}


def test_keys_depend_on_everything(tmp_path: Path) -> None:
    assert make_key("case", 1, {"a": 1}) == make_key("case", 1, {"a": 1})
    assert make_key("case", 1, {"a": 1}) != make_key("case", 1, {"a": 2})
    file = tmp_path / "a.py"
    file.write_text("x = 1\n", encoding="utf-8")
    before = source_stamp([file])
    file.write_text("x = 2\n", encoding="utf-8")
    assert source_stamp([file]) != before


def section(case: str, values: dict[str, Values], date: str = "2026-11-24") -> Section:
    return Section(case, "avx2", date, {"cpu": "a processor"}, values)


def test_documents_hold_every_section(tmp_path: Path) -> None:
    kept = tmp_path / "report.json"
    keep_sections(kept, [section("sd15-20", VALUES), section("sd15-4", VALUES)])
    fast = section(
        "sd15-4-fast", with_peers_of(section("sd15-4", VALUES), {"sdvino": {PICTURE: 5}})
    )
    everything = keep_sections(kept, [section("sd15-4", VALUES, "2026-11-25"), fast])
    assert [s.case for s in everything] == ["sd15-4", "sd15-20", "sd15-4-fast"]
    assert read_sections(kept) == everything
    assert everything[0].date == "2026-11-25"
    write_documents(tmp_path / "docs", everything)
    rows = json.loads((tmp_path / "docs" / "performance.json").read_text(encoding="utf-8"))
    ratios = [r["ratio"] for r in rows if r["case"] == "sd15-4-fast" and r["metric"] == PICTURE]
    assert ratios == [7, 4]
    text = (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 3
    assert "2026-11-25" in text
    assert (tmp_path / "docs" / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_fails_is_told_by_its_last_words() -> None:
    with pytest.raises(MeasureError, match="no such thing"):
        watch([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_a_worker_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    late = tmp_path / "late"
    program = f"import time; time.sleep(20); open({str(late)!r}, 'w')"
    with pytest.raises(MeasureError, match=r"given up after 0\.01 minutes"):
        watch([sys.executable, "-c", program], {}, 0.01)
    assert not late.exists()


@pytest.mark.skipif(not has_proc(), reason="reads /proc")
def test_the_memory_of_a_tree_is_measured() -> None:
    inner = "x = bytearray(60_000_000); import time; time.sleep(0.5)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    _, alone = watch([sys.executable, "-c", "import time; time.sleep(0.5)"], {})
    _, both = watch([sys.executable, "-c", outer], {})
    assert both > alone + 60_000_000


def test_a_process_is_stopped() -> None:
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if has_proc():
        assert list(tree(running.pid)) == [running.pid]
    stop(running)
    assert running.poll() is not None
    if has_proc():
        assert tree_highest(running.pid) == 0
