"""Tiny architectures whose sizes are as a single file implies them: heads 64 wide, groups of 32."""

from __future__ import annotations

from typing import Any

import synthetic_architectures as real

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
}
TEXT_2 = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 128,
}
KL = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}
UNET = {
    "sample_size": 16,
    "cross_attention_dim": 64,
    "layers_per_block": 1,
    "block_out_channels": [32, 32, 64, 64],
}
UNET_2 = {**UNET, "block_out_channels": [64, 64, 128, 128], "attention_head_dim": [1, 1, 2, 2]}
UNET_XL = {
    "sample_size": 16,
    "block_out_channels": [64, 64, 128],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 192,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 128 + 6 * 8,
}


def narrow(arch: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of ``arch`` with its components' configs changed."""
    plan = real.ARCHITECTURES[arch]
    components = {
        name: (library, cls, {**config, **changes.get(name, {})})
        for name, (library, cls, config) in plan["components"].items()
    }
    return {**plan, "components": components}


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "sd1": narrow("sd15", text_encoder=TEXT, unet=UNET, vae=KL),
    "sd2": narrow("sd2", text_encoder=TEXT, unet=UNET_2, vae=KL),
    "sd2-v": narrow("sd2-v", text_encoder=TEXT, unet=UNET_2, vae=KL),
    "sdxl": narrow("sdxl", text_encoder=TEXT, text_encoder_2=TEXT_2, unet=UNET_XL, vae=KL),
    "sd1-inpaint": {
        **narrow("sd15", text_encoder=TEXT, unet={**UNET, "in_channels": 9}, vae=KL),
        "pipeline": "StableDiffusionInpaintPipeline",
    },
}
