"""What the tensors of a UNet or of a text model tell of its config, in diffusers' naming."""

from __future__ import annotations

import re
from typing import Any

from sdvino.weights.layouts.rename import LayoutError, numbered
from sdvino.weights.safetensors import Shape, Tensors

# Width of an attention head: ViT-L, H and bigG alike.
_TEXT_HEAD = 64
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d{1,3})\..+")


def unet_config(tensors: Tensors, *, head_channels: int | None) -> dict[str, Any]:
    """Return what the tensors of a UNet2DConditionModel tell of its config; raises LayoutError.

    head_channels: width of an attention head, or None for Stable Diffusion 1.x's eight heads
    everywhere.
    """
    levels = _count(tensors, r"down_blocks\.(\d+)\.")
    layers = _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\.")
    widths = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels)]
    depths = _depths(tensors)
    down = [[depths.get(f"down_blocks.{i}.{k}", 0) for k in range(layers)] for i in range(levels)]
    up = [[depths.get(f"up_blocks.{i}.{k}", 0) for k in range(layers + 1)] for i in range(levels)]
    middle = depths.get("mid_block.0", 0)
    keys = [name for name in tensors if name.endswith("attn2.to_k.weight")]
    if not keys:
        raise LayoutError("nothing in it attends to text")
    inner = [t for name, t in tensors.items() if name.endswith(".proj_in.weight")]
    config: dict[str, Any] = {
        "in_channels": _shape(tensors, "conv_in.weight")[1],
        "out_channels": _shape(tensors, "conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": _shape(tensors, keys[0])[1],
        "use_linear_projection": any(len(tensor.shape) == 2 for tensor in inner),
        "down_block_types": [_type("Down", any(level)) for level in down],
        "up_block_types": [_type("Up", any(level)) for level in up],
        "attention_head_dim": 8
        if head_channels is None
        else [max(1, width // head_channels) for width in widths],
        **_transformer_layers(down, up, middle),
    }
    if not any(name.startswith("mid_block.") for name in tensors):
        config["mid_block_type"] = None
    elif not middle:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config


def text_config(tensors: Tensors) -> dict[str, Any]:
    """Return what the tensors of a CLIP text model tell of its config; raises LayoutError."""
    tokens = _shape(tensors, "text_model.embeddings.token_embedding.weight")
    layers = {int(m[1]) for name in tensors if (m := _TEXT_LAYER.fullmatch(name))}
    config = {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": _shape(
            tensors, "text_model.embeddings.position_embedding.weight"
        )[0],
        "num_hidden_layers": numbered(layers),
        "num_attention_heads": max(1, tokens[1] // _TEXT_HEAD),
    }
    if "text_projection.weight" in tensors:
        config["projection_dim"] = _shape(tensors, "text_projection.weight")[0]
    return config


def _shape(tensors: Tensors, name: str) -> Shape:
    """Return the shape of a matrix or a kernel; raises LayoutError where there is none."""
    if name not in tensors or len(tensors[name].shape) < 2:
        raise LayoutError(f"it has no {name}")
    return tensors[name].shape


def _count(tensors: Tensors, pattern: str) -> int:
    return numbered({int(m[1]) for name in tensors if (m := re.match(pattern, name))})


def _depths(tensors: Tensors) -> dict[str, int]:
    """Return block and number of an attention -> its transformer layers."""
    pattern = re.compile(r"(.+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.")
    found: dict[str, set[str]] = {}
    for name in tensors:
        if match := pattern.match(name):
            found.setdefault(f"{match[1]}.{match[2]}", set()).add(match[3])
    return {place: len(layers) for place, layers in found.items()}


def _type(way: str, attends: bool) -> str:
    return f"{'CrossAttn' if attends else ''}{way}Block2D"


def _transformer_layers(down: list[list[int]], up: list[list[int]], middle: int) -> dict[str, Any]:
    """Return diffusers' two ways of saying how many transformer layers there are."""

    def plain(depths: list[int]) -> int | list[int]:
        # A level without attention has the default, 1, which nothing reads.
        filled = [depth if depth else 1 for depth in depths]
        return filled[0] if len(set(filled)) == 1 else filled

    going_down, going_up = [plain(depths) for depths in down], [plain(depths) for depths in up]
    if middle and not any(down[-1]):
        going_down[-1] = middle  # the middle block's depth is that of the last level
    mirrored = all(
        a == b or not any(depths)
        for a, b, depths in zip(going_up, reversed(going_down), up, strict=True)
    )
    result: dict[str, Any] = {"transformer_layers_per_block": going_down}
    if set(map(str, going_down)) == {"1"}:
        result["transformer_layers_per_block"] = 1
    if not mirrored:
        result["reverse_transformer_layers_per_block"] = going_up
        result["transformer_layers_per_block"] = going_down
    return result
