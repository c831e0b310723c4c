"""The original naming of Stable Diffusion checkpoints (LDM, SGM), put into diffusers' naming.

Sources: ldm/modules/diffusionmodules/openaimodel.py of CompVis/latent-diffusion, open_clip's
transformer.py, and diffusers' loaders/single_file_utils.py, which the tests hold this against.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdvino.weights.layouts import autoencoder
from sdvino.weights.layouts.rename import LayoutError, numbered, rename, under
from sdvino.weights.numbers import rows, transposed
from sdvino.weights.safetensors import Tensor, Tensors

#: Where a whole checkpoint keeps its UNet, and Stable Diffusion 2.x its text encoder.
UNET = "model.diffusion_model."
OPEN_CLIP = "cond_stage_model.model."
_VAES = ("first_stage_model.", "vae.")
_CLIP = "cond_stage_model.transformer."
_SDXL_CLIP = "conditioner.embedders.0.transformer."
_SDXL_OPEN_CLIP = "conditioner.embedders.1.model."

#: Layers of a residual block: original name -> diffusers'.
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
#: Layers of a UNet outside of its blocks: original name -> diffusers'.
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d{1,3})\.(?:(\d)\.)?(.+)")
_UNET_END = re.compile(rf"({'|'.join(map(re.escape, UNET_ENDS))})\.(weight|bias)")
_RESNET_PART = re.compile(rf"({'|'.join(map(re.escape, RESNET))})\.(weight|bias)")


def split(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Return the components of a whole checkpoint, each with its tensors in diffusers' naming.

    What a pruned file lacks is absent: of unet, vae, text_encoder and text_encoder_2. Raises
    LayoutError for names that the original code does not give.
    """
    found: dict[str, dict[str, Tensor]] = {}
    clip, open_clip = under(tensors, _CLIP), under(tensors, OPEN_CLIP)
    xl, xl_2 = under(tensors, _SDXL_CLIP), under(tensors, _SDXL_OPEN_CLIP)
    if xl and xl_2:
        found["text_encoder"] = clip_tensors(xl)
        found["text_encoder_2"] = open_clip_tensors(xl_2, projection=True)
    elif clip:
        found["text_encoder"] = clip_tensors(clip)
    elif open_clip:
        found["text_encoder"] = open_clip_tensors(open_clip, projection=False)
    unet = under(tensors, UNET)
    if unet:
        found["unet"] = unet_tensors(unet)
    vae = next((inner for prefix in _VAES if (inner := under(tensors, prefix))), None)
    if vae is not None:
        found["vae"] = autoencoder.current(vae)
    return found


@dataclass(frozen=True, slots=True)
class _Levels:
    """How the flat list of a UNet's blocks is divided into levels."""

    #: Blocks of the list for each level: residual blocks, and one that halves the size.
    step: int

    @classmethod
    def of(cls, tensors: Tensors) -> _Levels:
        """Read the division from where the convolutions that halve the size are."""
        inputs = {
            int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d{1,3})\.", name))
        }
        halving = sorted(i for i in inputs if f"input_blocks.{i}.0.op.weight" in tensors)
        count = len(inputs)
        step = halving[0] if halving else count
        if inputs != set(range(count)) or step < 2 or count % step or count // step > 8:
            raise LayoutError("its blocks are not divided into levels as Stable Diffusion's are")
        if halving != list(range(step, count, step)):
            raise LayoutError("its levels have different numbers of blocks")
        return cls(step)


def unet_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a UNet in diffusers' naming; raises LayoutError."""
    levels = _Levels.of(tensors)
    return rename(tensors, lambda name: _unet_name(name, levels))


def _unet_name(name: str, levels: _Levels) -> str | None:
    end = _UNET_END.fullmatch(name)
    if end is not None:
        return f"{UNET_ENDS[end[1]]}.{end[2]}"
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
    level, layer = divmod(first - 1 if way == "input_blocks" else first, levels.step)
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
    return None if match is None else f"{block}.{RESNET[match[1]]}.{match[2]}"


def clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a CLIP text model in transformers' naming: the same, but for the old.

    Some merging tools of 2022 lost the first part of the name, and transformers once saved the
    positions' numbers.
    """
    kept = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}
    own = ("text_model.", "text_projection.")
    return rename(kept, lambda name: name if name.startswith(own) else f"text_model.{name}")


_OPEN_CLIP_ENDS = {
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


def open_clip_tensors(tensors: Tensors, *, projection: bool) -> dict[str, Tensor]:
    """Return the tensors of an OpenCLIP text model in transformers' naming; raises LayoutError.

    projection: with the projection of the pooled state and all layers (SDXL); otherwise without
    both it and the last layer, which Stable Diffusion 2.x does not use.
    """
    numbers = {int(m[1]) for name in tensors if (m := _OPEN_CLIP_LAYER.fullmatch(name))}
    layers = numbered(numbers) - (0 if projection else 1)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "text_projection":
            if projection:
                result["text_projection.weight"] = transposed(tensor)
        elif name in _OPEN_CLIP_ENDS:
            result[_OPEN_CLIP_ENDS[name]] = tensor
        elif (match := _OPEN_CLIP_LAYER.fullmatch(name)) is None:
            raise LayoutError(f"it has a {name[:80]}")
        elif int(match[1]) < layers:
            result.update(_open_clip_layer(name, tensor, match))
    return result


def _open_clip_layer(
    name: str, tensor: Tensor, match: re.Match[str]
) -> Iterator[tuple[str, Tensor]]:
    number, part, kind = match.groups()
    layer = f"text_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        if not tensor.shape or tensor.shape[0] % 3:
            raise LayoutError(f"{name} cannot be divided into queries, keys and values")
        third = tensor.shape[0] // 3
        for place, which in enumerate("qkv"):
            own = rows(tensor, place * third, (place + 1) * third)
            yield f"{layer}.self_attn.{which}_proj.{kind}", own
    elif part in _OPEN_CLIP_PART:
        yield f"{layer}.{_OPEN_CLIP_PART[part]}.{kind}", tensor
    else:
        raise LayoutError(f"it has a {name[:80]}")
