"""Small models for LoRAs to be merged into, and what a merge is held against."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdvino.convert.lora import check_loras, merge, open_lora
from tests.convert import lora_files
from tests.convert.lora_files import Model

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
SD_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SDXL_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 64,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def build(unet: dict[str, Any], text_encoders: Sequence[str]) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    modules = {name: classes[name](CLIPTextConfig(**TEXT)).eval() for name in text_encoders}
    return {"unet": UNet2DConditionModel.from_config(unet).eval(), **modules}


def small_sd() -> dict[str, Any]:
    """Return the modules of a small Stable Diffusion 1.x."""
    return build(SD_UNET, ["text_encoder"])


def small_sdxl() -> dict[str, Any]:
    """Return the modules of a small Stable Diffusion XL."""
    return build(SDXL_UNET, ["text_encoder", "text_encoder_2"])


def attention(layer: str) -> bool:
    """The layers that the oldest layouts can name."""
    return layer.rpartition(".")[0].endswith(("attn1", "attn2", "to_out", "self_attn"))


def shapes_of(modules: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        component: {n: tuple(w.shape) for n, w in lora_files.layers_of(module).items()}
        for component, module in modules.items()
    }


def check(modules: dict[str, Any], path: Path, expected: Model, weight: float = 1.0) -> None:
    """Merge ``path`` into copies of ``modules`` and compare every weight with ``expected``."""
    lora = open_lora(path, weight)
    assert check_loras([lora], shapes_of(modules)) == ()
    for component, module in modules.items():
        merged = copy.deepcopy(module)
        report = merge(merged, component, [lora])
        found = lora_files.layers_of(merged)
        assert report.unmatched == {}
        assert report.layers == len(expected.factors.get(component, {}))
        assert lora_files.largest_error(found, expected.expected(component, weight)) < 1e-5
        touched = lora_files.changed(found, expected.weights(component))
        assert touched == set(expected.factors.get(component, {}))
