from __future__ import annotations

import bench_linears
import pytest


def test_a_layer_is_measured_in_every_way() -> None:
    rates = bench_linears.measure((16, 32, 64), seconds=0.01, threads=1)
    assert len(rates) == len(bench_linears.WAYS)
    assert all(rate > 0 for rate in rates)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_linears, "LAYERS", ((16, 32, 64),))
    assert bench_linears.main(["--seconds", "0.01", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("GOP/s") == 3
    assert lines[-1].startswith("| 16, 32, 64 |")
