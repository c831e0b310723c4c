"""What a calibrated recipe plans for each family, before any library is imported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdvino.compress.calibration import CalibrationPlan
from sdvino.convert.api import look_ahead, make_request
from sdvino.errors import RequestError

Edit = Callable[[str, Any], None]


def planned(source: Path, recipe: str = "int8") -> CalibrationPlan:
    request = make_request(source, recipe=recipe, download=False)
    outlook = look_ahead(request, source.parent / "target")
    assert "calibrate" in [step.step.name for step in outlook.steps]
    return outlook.plan.calibration


def make_xl(source: Path, edit: Edit) -> None:
    shutil.copytree(source / "text_encoder", source / "text_encoder_2")
    shutil.copytree(source / "tokenizer", source / "tokenizer_2")
    edit("text_encoder_2/config.json", {"projection_dim": 40})
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 40 + 6 * 8}
    edit(
        "unet/config.json", {"addition_embed_type": "text_time", "cross_attention_dim": 64, **sizes}
    )
    more = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    edit("model_index.json", {"_class_name": "StableDiffusionXLPipeline", **more})


@pytest.mark.parametrize("recipe", ["int8", "int8-hybrid"])
def test_sdxl_is_calibrated_on_every_stratum(source: Path, edit: Edit, recipe: str) -> None:
    make_xl(source, edit)
    plan = planned(source, recipe)
    assert plan.few_steps == ()
    assert plan.branches == 2
    assert plan.shape == (4, 16, 16)


def test_turbo_is_calibrated_on_few_steps_without_guidance(source: Path, edit: Edit) -> None:
    make_xl(source, edit)
    scheduler = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    edit("scheduler/scheduler_config.json", scheduler)
    plan = planned(source)
    assert plan.few_steps
    assert plan.sampler == "euler_ancestral"
    assert plan.branches == 1


def test_an_lcm_is_calibrated_on_few_steps_with_its_guidance(source: Path, edit: Edit) -> None:
    edit("unet/config.json", {"time_cond_proj_dim": 16})
    edit("model_index.json", {"_class_name": "LatentConsistencyModelPipeline"})
    edit("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"})
    plan = planned(source)
    assert plan.few_steps
    assert plan.sampler == "lcm"
    assert plan.guidance_scale == 8.5
    assert plan.branches == 1


@pytest.mark.parametrize("recipe", ["int8", "int8-hybrid"])
def test_inpainting_is_refused_in_one_sentence(source: Path, edit: Edit, recipe: str) -> None:
    edit("unet/config.json", {"in_channels": 9})
    edit("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"})
    with pytest.raises(RequestError, match=r"inpainting.*int8-weights") as caught:
        planned(source, recipe)
    assert "\n" not in str(caught.value)
    request = make_request(source, recipe="int8-weights", download=False)
    assert look_ahead(request, source.parent / "target").steps


def test_activations_of_one_component_count_too(source: Path, edit: Edit) -> None:
    edit("unet/config.json", {"in_channels": 9})
    request = make_request(
        source, recipe="fp16", components={"vae_decoder": "int8"}, download=False
    )
    with pytest.raises(RequestError, match="inpainting"):
        look_ahead(request, source.parent / "target")
