from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_architectures as real

from sdvino.convert.families import FAMILIES, PIPELINE_CLASSES, find_family, read_facts
from sdvino.settings import SAMPLERS

CONFIGS = Path(__file__).resolve().parents[2] / "sdvino" / "convert" / "configs"


def family_of(arch: str, names: str = "", **unet: Any) -> str:
    plan = real.ARCHITECTURES[arch]
    config = {**plan["components"]["unet"][2], **unet}
    return find_family(
        read_facts(config, plan["components"]["text_encoder"][2], plan["scheduler"], names)
    ).name


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sd15", "sd1"),
        ("sd2", "sd2"),
        ("sd2-v", "sd2-v"),
        ("lcm", "sd1-lcm"),
        ("sdxl", "sdxl"),
        ("tiny-sd15", "sd1"),
        ("tiny-small-sd", "sd1-small"),
        ("tiny-sd2", "sd2"),
        ("tiny-sd2-v", "sd2-v"),
        ("tiny-sd-turbo", "sd-turbo"),
        ("tiny-lcm", "sd1-lcm"),
        ("tiny-inpaint", "sd1-inpaint"),
        ("tiny-sdxl", "sdxl"),
        ("tiny-sdxl-turbo", "sdxl-turbo"),
        ("tiny-ssd1b", "ssd-1b"),
    ],
)
def test_a_family_is_told_by_its_configs(arch: str, family: str) -> None:
    assert family_of(arch) == family


def test_names_decide_only_where_nothing_else_does() -> None:
    assert family_of("sdxl", "sdxl_lightning_4step") == "sdxl-lightning"
    assert family_of("sdxl", "stabilityai/sdxl-turbo") == "sdxl-turbo"
    assert family_of("sd15", "my lightning pictures") == "sd1"
    assert family_of("sdxl", "lightning", in_channels=9) == "sdxl-inpaint"
    assert family_of("sdxl", "lightning", time_cond_proj_dim=256) == "sdxl-lcm"
    shallow = {"transformer_layers_per_block": [0, 2, 4]}
    assert family_of("sdxl", "", **shallow) == "ssd-1b"


def test_the_table_is_whole() -> None:
    for family in FAMILIES:
        assert family.pipeline in PIPELINE_CLASSES
        assert family.scheduler in SAMPLERS
        assert family.runs == ("inpaint" not in family.name)
        assert (family.added_conditioning == "text_time") == (len(family.text_encoders) == 2)
    assert FAMILIES[-1].name == "sd1"
    assert not FAMILIES[-1].signs


def test_the_configs_that_ship_are_the_published_ones() -> None:
    """As far as shapes do not tell; the rest is held against diffusers' modules elsewhere."""
    for folder, arch in (("sd1", "sd15"), ("sd2", "sd2"), ("sdxl", "sdxl")):
        for name, (_, _, config) in real.ARCHITECTURES[arch]["components"].items():
            shipped = json.loads((CONFIGS / folder / f"{name}.json").read_text(encoding="utf-8"))
            for key in ("hidden_act", "pad_token_id", "eos_token_id", "scaling_factor"):
                if key in config:
                    assert shipped[key] == config[key], (folder, name, key)
    for folder, arch in (("sd1", "sd15"), ("sd2-v", "sd2-v"), ("sdxl", "sdxl")):
        shipped = json.loads((CONFIGS / folder / "scheduler.json").read_text(encoding="utf-8"))
        for key, value in real.ARCHITECTURES[arch]["scheduler"].items():
            assert shipped.get(key, value) == value, (folder, key)
