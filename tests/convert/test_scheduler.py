from __future__ import annotations

import copy
from typing import Any

import pytest

from sdvino.convert.metadata import GENAI_SCHEDULERS, portable_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", GENAI_SCHEDULERS)
def test_a_scheduler_that_genai_knows_stays(name: str) -> None:
    config = {"_class_name": name, **BETAS, "timestep_spacing": "trailing"}
    before = copy.deepcopy(config)
    result = portable_scheduler(config)
    assert config == before
    assert {key: result[key] for key in config} == config


def test_another_becomes_ddim_and_keeps_its_fields() -> None:
    config: dict[str, Any] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_name_or_path": "/home/someone/model",
        **BETAS,
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
    }
    assert portable_scheduler(config) == {
        "_class_name": "DDIMScheduler",
        **BETAS,
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def test_outdated_files_are_mended_as_diffusers_pipeline_does() -> None:
    old = {"_class_name": "DDIMScheduler", **BETAS, "clip_sample": True, "steps_offset": 0}
    result = portable_scheduler(old)
    assert result["clip_sample"] is False
    assert result["steps_offset"] == 1
