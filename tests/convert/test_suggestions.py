from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdvino.convert.source import DiffusersFolder
from sdvino.convert.suggestions import parse_suggestions, suggestions
from sdvino.errors import RequestError

Edit = Callable[[str, Any], None]


def test_family_defaults_replace_a_historic_scheduler(source: Path) -> None:
    assert suggestions(DiffusersFolder.open(source), {}) == {
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "scheduler": "dpmpp_2m",
    }


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("EulerAncestralDiscreteScheduler", (20, 7.5, "euler_ancestral")),
        ("UniPCMultistepScheduler", (20, 7.5, "unipc")),
        ("LCMScheduler", (4, 1.0, "lcm")),
        ("TCDScheduler", (4, 1.0, "tcd")),
    ],
)
def test_a_scheduler_that_someone_chose_is_kept(
    source: Path, edit: Edit, scheduler: str, expected: tuple[int, float, str]
) -> None:
    edit("scheduler/scheduler_config.json", {"_class_name": scheduler})
    found = suggestions(DiffusersFolder.open(source), {})
    assert (found["num_inference_steps"], found["guidance_scale"], found["scheduler"]) == expected


def test_the_source_s_own_word_goes_before_defaults_and_the_caller_s_before_both(
    source: Path,
) -> None:
    own = {"suggested": {"num_inference_steps": 12, "guidance_scale": 4, "width": 128}}
    (source / "sdvino.json").write_text(json.dumps(own), encoding="utf-8")
    folder = DiffusersFolder.open(source)
    assert suggestions(folder, {})["num_inference_steps"] == 12
    assert suggestions(folder, {"steps": 8}) == {
        "num_inference_steps": 8,
        "guidance_scale": 4,
        "scheduler": "dpmpp_2m",
    }


def test_the_command_line_s_spelling_is_read() -> None:
    assert parse_suggestions("steps=8, guidance=1.5,scheduler=lcm") == {
        "num_inference_steps": 8,
        "guidance_scale": 1.5,
        "scheduler": "lcm",
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "steps", "steps=", "steps=x", "steps=0", "steps=1.5", "steps=8,,guidance=2"),
        *("guidance=nan", "guidance=-1", "guidance=inf", "scheduler=best", "size=512"),
    ],
)
def test_wrong_suggestions_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_suggestions(text)
