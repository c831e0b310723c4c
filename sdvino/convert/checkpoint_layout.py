"""The original naming of Stable Diffusion checkpoints (LDM, SGM), put into diffusers' naming.

Everything is read from the names and shapes of the header: which tensor of the file becomes which
of a component, and the component's config. Sources: ldm/modules/diffusionmodules/openaimodel.py and
model.py of CompVis/latent-diffusion, open_clip's transformer.py, and diffusers'
loaders/single_file_utils.py, which the tests hold this against.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
#: same: as it is; linear: a 1 x 1 convolution's weight as a linear's; transposed; or a third of the
#: rows (q, k, v).
Change = Literal["same", "linear", "transposed", "q", "k", "v"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor of a component comes from."""

    #: Name in the file.
    source: str
    change: Change
    #: Of the result.
    shape: Shape


class LayoutError(Exception):
    """The names or shapes are not those of the architecture; says which."""


UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
SDXL_CLIP = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP = "conditioner.embedders.1.model."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d{1,3})\.(?:(\d)\.)?(.+)")
_UNET_END = re.compile(rf"({'|'.join(map(re.escape, _UNET_ENDS))})\.(weight|bias)")
_RESNET_PART = re.compile(rf"({'|'.join(map(re.escape, _RESNET))})\.(weight|bias)")


def under(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class UnetBlocks:
    """How the flat list of a UNet's blocks is divided into levels."""

    levels: int
    #: Residual blocks of a level on the way down; one more on the way up.
    layers: int

    @classmethod
    def of(cls, shapes: Shapes) -> UnetBlocks:
        """Read the division from where the convolutions that halve the size are."""
        inputs = {
            int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d{1,3})\.", name))
        }
        halving = sorted(i for i in inputs if f"input_blocks.{i}.0.op.weight" in shapes)
        count = len(inputs)
        step = halving[0] if halving else count
        if inputs != set(range(count)) or step < 2 or count % step or count // step > 8:
            raise LayoutError("its blocks are not divided into levels as Stable Diffusion's are")
        if halving != list(range(step, count, step)):
            raise LayoutError("its levels have different numbers of blocks")
        return cls(levels=count // step, layers=step - 1)


def unet_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Return diffusers' names of the UNet's tensors ``shapes``; raises LayoutError."""
    blocks = UnetBlocks.of(shapes)
    return _rename(shapes, lambda name: _unet_name(name, blocks))


def _unet_name(name: str, blocks: UnetBlocks) -> str | None:
    end = _UNET_END.fullmatch(name)
    if end is not None:
        return f"{_UNET_ENDS[end[1]]}.{end[2]}"
    match = _UNET_BLOCK.fullmatch(name)
    if match is None:
        return None
    way, first, second, rest = match[1], int(match[2]), match[3], match[4]
    if way == "middle_block":
        whole = rest if second is None else f"{second}.{rest}"
        if first == 1:
            return f"mid_block.attentions.0.{whole}"
        return _resnet(f"mid_block.resnets.{min(first, 1)}", whole)
    if second is None:
        return None
    step = blocks.layers + 1
    level, layer = divmod(first - 1 if way == "input_blocks" else first, step)
    block = f"{'down' if way == 'input_blocks' else 'up'}_blocks.{level}"
    if rest.startswith("op.") and way == "input_blocks":
        return f"{block}.downsamplers.0.conv.{rest[3:]}"
    if rest.startswith("conv.") and second != "0" and way == "output_blocks":
        return f"{block}.upsamplers.0.conv.{rest[5:]}"
    if second == "0":
        return _resnet(f"{block}.resnets.{layer}", rest)
    return f"{block}.attentions.{layer}.{rest}"


def _resnet(block: str, rest: str) -> str | None:
    match = _RESNET_PART.fullmatch(rest)
    return None if match is None else f"{block}.{_RESNET[match[1]]}.{match[2]}"


def unet_config(shapes: Shapes, *, head_channels: int | None) -> dict[str, Any]:
    """Return what the shapes of a UNet tell of its config; raises LayoutError.

    head_channels: width of an attention head, or None for Stable Diffusion 1.x's eight heads
    everywhere.
    """
    blocks = UnetBlocks.of(shapes)
    step = blocks.layers + 1
    starts = [1 + level * step for level in range(blocks.levels)]
    try:
        widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]
        conv_in, conv_out = shapes["input_blocks.0.0.weight"], shapes["out.2.weight"]
    except KeyError as error:
        raise LayoutError(f"it has no {error.args[0]}") from error
    down = [[_depth(shapes, f"input_blocks.{i + k}.1") for k in range(step - 1)] for i in starts]
    ups = [range(level * step, level * step + step) for level in range(blocks.levels)]
    up = [[_depth(shapes, f"output_blocks.{i}.1") for i in level] for level in ups]
    middle = _depth(shapes, "middle_block.1")
    keys = [n for n in shapes if n.endswith("attn2.to_k.weight")]
    if not keys:
        raise LayoutError("nothing in it attends to text")
    linear = any(len(shapes[n]) == 2 for n in shapes if n.endswith(".1.proj_in.weight"))
    config: dict[str, Any] = {
        "in_channels": conv_in[1],
        "out_channels": conv_out[0],
        "block_out_channels": widths,
        "layers_per_block": blocks.layers,
        "cross_attention_dim": shapes[keys[0]][1],
        "use_linear_projection": linear,
        "down_block_types": [_type("Down", any(depths)) for depths in down],
        "up_block_types": [_type("Up", any(depths)) for depths in up],
        "attention_head_dim": 8
        if head_channels is None
        else [max(1, width // head_channels) for width in widths],
        **_depths(down, up, middle),
    }
    if not any(name.startswith("middle_block.") for name in shapes):
        config["mid_block_type"] = None
    elif not middle:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config


def _type(way: str, attends: bool) -> str:
    return f"{'CrossAttn' if attends else ''}{way}Block2D"


def _depth(shapes: Shapes, block: str) -> int:
    """Return the number of transformer layers in an attention block, 0 without one."""
    found = {
        name[len(block) :].split(".")[2]
        for name in shapes
        if name.startswith(f"{block}.transformer_blocks.")
    }
    return len(found)


def _depths(down: list[list[int]], up: list[list[int]], middle: int) -> dict[str, Any]:
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


_VAE_SAME = re.compile(r"(?:encoder|decoder)\.conv_(?:in|out)\.\w+|(?:post_)?quant_conv\.\w+")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d)\.block\.(\d)\.(\w+)\.(\w+)")
_VAE_SAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d)\.(down|up)sample\.conv\.(\w+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_([12])\.(\w+)\.(\w+)")
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def vae_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Return diffusers' names of the autoencoder's tensors ``shapes``; raises LayoutError."""
    levels = _vae_levels(shapes)
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith("loss.")}
    return _rename(wanted, lambda name: _vae_name(name, levels))


def _vae_levels(shapes: Shapes) -> int:
    found = {int(m[2]) for name in shapes if (m := _VAE_BLOCK.fullmatch(name))}
    if not found or found != set(range(len(found))):
        raise LayoutError("its levels are not those of Stable Diffusion's")
    return len(found)


def _vae_name(name: str, levels: int) -> str | None:
    if _VAE_SAME.fullmatch(name) is not None:
        return name
    if (match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(\w+)", name)) is not None:
        return f"{match[1]}.conv_norm_out.{match[2]}"

    def level(half: str, number: str) -> str:
        if half == "encoder":
            return f"encoder.down_blocks.{number}"
        return f"decoder.up_blocks.{levels - 1 - int(number)}"

    if (match := _VAE_BLOCK.fullmatch(name)) is not None:
        part = "conv_shortcut" if match[4] == "nin_shortcut" else match[4]
        return f"{level(match[1], match[2])}.resnets.{match[3]}.{part}.{match[5]}"
    if (match := _VAE_SAMPLER.fullmatch(name)) is not None:
        return f"{level(match[1], match[2])}.{match[3]}samplers.0.conv.{match[4]}"
    if (match := _VAE_MIDDLE.fullmatch(name)) is not None:
        half, kind, number, part, value = match.groups()
        if kind == "block":
            return f"{half}.mid_block.resnets.{int(number) - 1}.{part}.{value}"
        if part in _VAE_ATTENTION:
            return f"{half}.mid_block.attentions.0.{_VAE_ATTENTION[part]}.{value}"
    return None


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return what the shapes of an autoencoder tell of its config; raises LayoutError."""
    levels = _vae_levels(shapes)
    try:
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        decoder_in, conv_in = shapes["decoder.conv_in.weight"], shapes["encoder.conv_in.weight"]
    except KeyError as error:
        raise LayoutError(f"it has no {error.args[0]}") from error
    layers = {m[3] for n in shapes if (m := _VAE_BLOCK.fullmatch(n)) and m[1] == "encoder"}
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": len(layers),
        "latent_channels": decoder_in[1],
        "in_channels": conv_in[1],
    }


def clip_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Return transformers' names of a CLIP text model's tensors: the same, but for old merges."""

    def name_of(name: str) -> str | None:
        # Some merging tools of 2022 lost the first part of the name.
        return name if name.startswith("text_model.") else f"text_model.{name}"

    return _rename(_without_ids(shapes), name_of)


def _without_ids(shapes: Shapes) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}


_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_PART = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+?)[._](weight|bias)")


def open_clip_tensors(shapes: Shapes, *, projection: bool) -> dict[str, Tensor]:
    """Return transformers' names of an OpenCLIP text model's tensors; raises LayoutError.

    projection: with the projection of the pooled state and all layers (SDXL); otherwise without
    both it and the last layer, which Stable Diffusion 2.x does not use.
    """
    layers = _layers(shapes, _OPEN_CLIP_LAYER) - (0 if projection else 1)
    result: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "text_projection":
            if projection:
                result["text_projection.weight"] = Tensor(name, "transposed", shape[::-1])
            continue
        if name in _OPEN_CLIP:
            result[_OPEN_CLIP[name]] = Tensor(name, "same", shape)
            continue
        match = _OPEN_CLIP_LAYER.fullmatch(name)
        if match is None:
            raise LayoutError(f"it has a {name[:80]}")
        if int(match[1]) < layers:
            result.update(_open_clip_layer(name, shape, *match.groups()))
    return result


def _open_clip_layer(
    name: str, shape: Shape, number: str, part: str, kind: str
) -> Iterator[tuple[str, Tensor]]:
    layer = f"text_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        if shape[0] % 3:
            raise LayoutError(f"{name} cannot be divided into queries, keys and values")
        third = (shape[0] // 3, *shape[1:])
        for which in ("q", "k", "v"):
            change: Change = which
            yield f"{layer}.self_attn.{which}_proj.{kind}", Tensor(name, change, third)
    elif part in _OPEN_CLIP_PART:
        yield f"{layer}.{_OPEN_CLIP_PART[part]}.{kind}", Tensor(name, "same", shape)
    else:
        raise LayoutError(f"it has a {name[:80]}")


def _layers(shapes: Shapes, pattern: re.Pattern[str]) -> int:
    found = {int(m[1]) for name in shapes if (m := pattern.fullmatch(name))}
    if not found or found != set(range(len(found))):
        raise LayoutError("some of its layers are missing")
    return len(found)


_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d{1,3})\..+")
# ViT-L, H and bigG alike.
_HEAD_WIDTH = 64


def text_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the (renamed) tensors of a text model tell of its config; raises LayoutError."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        tokens = shapes["text_model.embeddings.token_embedding.weight"]
        positions = shapes["text_model.embeddings.position_embedding.weight"]
        inner = shapes["text_model.encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise LayoutError(f"it has no {error.args[0]}") from error
    config = {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "intermediate_size": inner[0],
        "max_position_embeddings": positions[0],
        "num_hidden_layers": _layers(shapes, _CLIP_LAYER),
        "num_attention_heads": max(1, tokens[1] // _HEAD_WIDTH),
    }
    if "text_projection.weight" in shapes:
        config["projection_dim"] = shapes["text_projection.weight"][0]
    return config


def _rename(shapes: Shapes, name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        new = name_of(name)
        if new is None or new in result:
            raise LayoutError(f"it has a {name[:80]}")
        # The autoencoder's attention was written with convolutions.
        flat = ".mid_block.attentions.0.to_" in new and len(shape) == 4 and shape[2:] == (1, 1)
        result[new] = Tensor(name, "linear" if flat else "same", shape[:2] if flat else shape)
    return result
