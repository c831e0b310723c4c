"""What scripts/toolbox_real.py says of the passes at Stable Diffusion's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import toolbox_real
from toolbox_goals import goals
from toolbox_record import Findings
from toolbox_report import report
from toolbox_variants import VARIANTS

from sdvino.compress.recipe_file import from_toml
from sdvino.errors import SdvinoError


@pytest.mark.parametrize("name", toolbox_real.QUANTIZATIONS)
def test_what_it_quantizes_by_is_a_recipe(name: str) -> None:
    _, rows = toolbox_real.QUANTIZATIONS[name]
    recipe = from_toml(f"name = 'real'\n{rows}{toolbox_real._FEW}")
    assert recipe.components["unet"].mode == name
    assert recipe.components["vae_decoder"].mode == "fp16"
    assert recipe.calibration.samples == 2


def test_a_quantization_is_told_by_its_bytes() -> None:
    entry = {
        "what": "by layer",
        "seconds": 600,
        "cpu_seconds": 900,
        "peak_bytes": 8.04e9,
        "bytes_left": 0.3,
    }
    machine = {"usable_cores": 1, "cores": 2}
    real = {"what": "A small one", "machine": machine, "passes": {"local": entry}}
    page = report(Findings(real=real), VARIANTS, "the command")
    assert "| by layer | 15 min | 8.0 GB |  |  | 30.0% |" in page


@pytest.mark.parametrize(
    ("peak", "left", "word"),
    [(8e9, 0, "met"), (11e9, 0, "missed"), (8e9, 1, "not measured"), (11e9, 1, "missed")],
)
def test_no_memory_goal_is_met_before_every_pass_was_run(peak: float, left: int, word: str) -> None:
    names = [*toolbox_real.PASSES, *toolbox_real.QUANTIZATIONS]
    passes = {name: {"peak_bytes": peak} for name in names[left:]}
    found = goals(Findings(real={"passes": passes}))
    (goal,) = (goal for goal in found if "within 10 GB" in goal.asked)
    assert goal.word == word
    assert ("left: lean" in goal.found) == (word == "not measured")


def test_what_fails_is_told_by_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(SdvinoError, match=r"What makes lean failed: .*none"):
        toolbox_real._run_pass(tmp_path / "none", tmp_path, "lean", "")
