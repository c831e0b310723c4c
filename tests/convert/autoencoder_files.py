"""Autoencoders as files: small ones, in the namings that people share them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

KL = {
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.18215,
}
TINY = {
    "encoder_block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "num_encoder_blocks": [1, 2, 1, 1],
    "num_decoder_blocks": [2, 1, 1, 1],
}


def kl(**changes: Any) -> Any:
    """A small AutoencoderKL with random weights, its norms' included."""
    from diffusers import AutoencoderKL

    return _randomized(AutoencoderKL.from_config({**KL, **changes}))


def tiny(**changes: Any) -> Any:
    """A small AutoencoderTiny with random weights."""
    from diffusers import AutoencoderTiny

    return _randomized(AutoencoderTiny.from_config({**TINY, **changes}))


def _randomized(module: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for value in module.parameters():
        value.data = value.data + 0.05 * torch.randn(value.shape, generator=generator)
    return module.eval()


def to_original(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors under the names of CompVis' code, written down apart from what is tested."""
    ups = 1 + max(int(m[1]) for name in state if (m := re.search(r"up_blocks\.(\d+)", name)))
    steps: list[tuple[str, Any]] = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (
            r"up_blocks\.(\d+)\.resnets\.(\d+)",
            lambda m: f"up.{ups - 1 - int(m[1])}.block.{m[2]}",
        ),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ]
    found = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in steps:
            new = re.sub(pattern, replacement, new)
        if "attn_1" in new and value.ndim == 2:
            value = value[..., None, None]
        found[prefix + new] = value
    return found


def to_old_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The names of diffusers before 0.15."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, value in state.items():
        new = name
        for ours, theirs in old.items():
            new = new.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        found[new] = value
    return found


def taesd_halves(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """TAESD's own two files: plain sequences, the decoder's with a clamp in front."""
    halves: dict[str, dict[str, Any]] = {"encoder": {}, "decoder": {}}
    for name, value in state.items():
        side, _, number, rest = name.split(".", 3)
        halves[side][f"{int(number) + (side == 'decoder')}.{rest}"] = value
    return halves["encoder"], halves["decoder"]


def save(path: Path, tensors: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    return path
