"""Small models for LoRAs to be merged into, and what a merge is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdvino.weights.lora import Lora, open_lora
from sdvino.weights.lora_merge import check_loras, merge
from sdvino.weights.numbers import as_float32, of_array
from sdvino.weights.safetensors import Tensor, Tensors
from tests.weights import lora_files
from tests.weights.lora_files import Model

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


def tensors_of(module: Any) -> dict[str, Tensor]:
    """The parameters of a torch module, under their names."""
    kinds = {torch.float32: "F32", torch.float16: "F16"}
    return {
        name: of_array(value.detach().numpy(), kinds[value.dtype])
        for name, value in module.named_parameters()
    }


def merged_layers(module: Any, component: str, loras: Sequence[Lora]) -> dict[str, Any]:
    """The weights of ``module`` by layer, with ``loras`` merged into them, in single precision."""
    merged = merge(tensors_of(module), loras, component)
    return {
        layer: torch.from_numpy(as_float32(merged[f"{layer}.weight"]))
        for layer in lora_files.layers_of(module)
    }


def all_tensors(modules: dict[str, Any]) -> dict[str, Tensors]:
    return {component: tensors_of(module) for component, module in modules.items()}


def check(modules: dict[str, Any], path: Path, expected: Model, weight: float = 1.0) -> None:
    """Merge ``path`` into ``modules`` and compare every weight with ``expected``."""
    lora = open_lora(path, weight)
    assert check_loras([lora], all_tensors(modules)) == ()
    for component, module in modules.items():
        found = merged_layers(module, component, [lora])
        assert lora_files.largest_error(found, expected.expected(component, weight)) < 1e-5
        touched = lora_files.changed(found, expected.weights(component))
        assert touched == set(expected.factors.get(component, {}))
