"""A UNet of diffusers in miniature, with what a pass needs: blocks that can go, heads, inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def tiny_unet(seed: int = 0) -> Any:
    """Random weights, float32, in eval mode."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(CONFIG)
    return unet.eval().requires_grad_(False)


def calls(count: int = 4) -> list[dict[str, Any]]:
    """Inputs that lie in few directions, as real activations do."""
    rng = np.random.default_rng(1)
    basis = rng.standard_normal((3, 77 * 12), dtype=np.float32)
    return [
        {
            "sample": rng.standard_normal((1, 4, 8, 8), dtype=np.float32),
            "timestep": np.array([1000 * (i + 1) // (count + 1)]),
            "encoder_hidden_states": (rng.standard_normal((1, 3), dtype=np.float32) @ basis)
            .reshape(1, 77, 12)
            .astype(np.float32),
        }
        for i in range(count)
    ]
