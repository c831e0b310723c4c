"""The smallest files that are laid out as checkpoints are: enough to be told apart, not to run."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TOKENS = 49_408
Shapes = dict[str, tuple[int, ...]]

_UNET: Shapes = {
    "input_blocks.0.0.weight": (64, 4, 3, 3),
    "input_blocks.1.0.out_layers.3.weight": (64, 64, 3, 3),
    "input_blocks.1.1.proj_in.weight": (64, 64, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
    "middle_block.0.out_layers.3.weight": (64, 64, 3, 3),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
    "output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
    "output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
    "out.2.weight": (4, 64, 3, 3),
}
_VAE_CONVS = {
    "encoder.conv_in": (32, 3, 3, 3),
    "encoder.down.0.block.0.conv1": (32, 32, 3, 3),
    "encoder.down.0.block.0.conv2": (32, 32, 3, 3),
    "encoder.mid.block_1.conv1": (32, 32, 3, 3),
    "encoder.mid.block_1.conv2": (32, 32, 3, 3),
    "encoder.mid.block_2.conv1": (32, 32, 3, 3),
    "encoder.mid.block_2.conv2": (32, 32, 3, 3),
    "encoder.conv_out": (8, 32, 3, 3),
    "decoder.conv_in": (32, 4, 3, 3),
    "decoder.mid.block_1.conv1": (32, 32, 3, 3),
    "decoder.mid.block_1.conv2": (32, 32, 3, 3),
    "decoder.mid.block_2.conv1": (32, 32, 3, 3),
    "decoder.mid.block_2.conv2": (32, 32, 3, 3),
    "decoder.up.0.block.0.conv1": (32, 32, 3, 3),
    "decoder.up.0.block.0.conv2": (32, 32, 3, 3),
    "decoder.up.0.block.1.conv1": (32, 32, 3, 3),
    "decoder.up.0.block.1.conv2": (32, 32, 3, 3),
    "decoder.conv_out": (3, 32, 3, 3),
}
_VAE_NORMS = [
    name.replace("conv", "norm")
    for name in _VAE_CONVS
    if name.endswith(("conv1", "conv2", "conv_out"))
]
_VAE: Shapes = {
    **{f"{name}.weight": shape for name, shape in _VAE_CONVS.items()},
    **{f"{name}.bias": shape[:1] for name, shape in _VAE_CONVS.items()},
    **{f"{name}.{part}": (32,) for name in _VAE_NORMS for part in ("weight", "bias")},
}
_CLIP: Shapes = {
    "text_model.embeddings.token_embedding.weight": (TOKENS, 64),
    "text_model.embeddings.position_embedding.weight": (77, 64),
    "text_model.encoder.layers.0.mlp.fc1.weight": (96, 64),
}
_OPEN_CLIP: Shapes = {
    "token_embedding.weight": (TOKENS, 64),
    "positional_embedding": (77, 64),
    "text_projection": (64, 64),
    "transformer.resblocks.0.mlp.c_fc.weight": (96, 64),
    "transformer.resblocks.0.attn.in_proj_weight": (192, 64),
    "transformer.resblocks.1.mlp.c_fc.weight": (96, 64),
}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes_of(kind: str) -> Shapes:
    """Return the shapes of a checkpoint: sd1, sd2 or sdxl."""
    result = prefixed("model.diffusion_model.", _UNET) | prefixed("first_stage_model.", _VAE)
    if kind == "sd1":
        return result | prefixed("cond_stage_model.transformer.", _CLIP)
    result["model.diffusion_model.input_blocks.1.1.proj_in.weight"] = (64, 64)
    if kind == "sd2":
        return result | prefixed("cond_stage_model.model.", _OPEN_CLIP)
    wide = {n: (64, 128) for n in result if n.endswith("attn2.to_k.weight")}
    labels = {"model.diffusion_model.label_emb.0.0.weight": (256, 64 + 6 * 8)}
    text = prefixed("conditioner.embedders.0.transformer.", _CLIP)
    return result | wide | labels | text | prefixed("conditioner.embedders.1.model.", _OPEN_CLIP)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: dict[str, str] | None = None,
    dtype: Any = np.float16,
    values: Mapping[str, float] | None = None,
) -> Path:
    """Write weights of zeros but for ``values``, each one number for a whole tensor."""
    fill = {} if values is None else values
    tensors = {n: np.full(shape, fill.get(n, 0.0), dtype) for n, shape in shapes.items()}
    save_file(tensors, path, metadata)
    return path


def write_header(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a file whose header says ``header``, whatever follows."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
