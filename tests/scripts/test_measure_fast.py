from __future__ import annotations

import json
import re
from pathlib import Path

import measure_fast
import pytest
from PIL import Image


def test_psnr() -> None:
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (51, 51, 51))
    assert measure_fast.psnr(black, black) == measure_fast.MAX_PSNR
    assert measure_fast.psnr(grey, black) == pytest.approx(13.98, abs=0.01)


def without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d+ \(\d+\.\d+ x\)", "", text)


@pytest.mark.slow
def test_two_variants_are_measured_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    page = tmp_path / "fast.md"
    arguments = ["--prompts", "2", "--steps", "2", "--only=--tiny-vae", "--out", str(page)]
    arguments += ["--rounds", "1", "--work", str(tmp_path / "work")]
    assert measure_fast.main(arguments) == 0
    text = page.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "option" not in line]
    assert [row.split(" | ")[0] for row in rows] == ["| exact", "| tiny VAE"]
    assert " dB" in rows[1]
    values = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    told = [one["variant"]["options"] for one in values["results"]]
    assert told == ["", "--tiny-vae"]
    assert f"{values['results'][1]['psnr']:.1f} dB" in rows[1]
    records = {path: path.read_bytes() for path in (tmp_path / "work").glob("*.jsonl")}
    assert len(records) == 2
    assert measure_fast.main(arguments) == 0
    again = page.read_text(encoding="utf-8")
    assert without_seconds(again) == without_seconds(text)
    assert records == {path: path.read_bytes() for path in records}  # nothing was drawn again
