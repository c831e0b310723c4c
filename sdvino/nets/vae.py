"""AutoencoderKL: pictures to latents and back (Rombach et al. 2022, arXiv:2112.10752).

Nothing that a pipeline scales or clamps is in these graphs: folders with them run elsewhere too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov
from openvino import opset13 as ops

from sdvino.nets import layers as nn
from sdvino.nets.layers import Layers, UnknownNetwork, Value
from sdvino.nets.structure import Structure
from sdvino.weights.safetensors import Tensors

_EPS = 1e-6
_BLOCKS: Mapping[str, str] = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}


def vae_decoder(
    config: Mapping[str, Any], tensors: Tensors, *, structure: Structure | None = None
) -> ov.Model:
    """Return the decoder: ``latent_sample`` f32 [N, C, h, w] -> ``sample`` f32 [N, 3, H, W].

    ``config`` is diffusers' config.json of an AutoencoderKL, ``tensors`` are all of its weights.
    ``structure`` says what low rank left of it. The picture is in [-1, 1], more or less.
    Raises RequestError when they do not fit, UnknownNetwork for other autoencoders.
    """
    w = _half(config, tensors, structure, ("decoder.", "post_quant_conv."))
    block = _Blocks(w, config)
    channels = list(reversed(config["block_out_channels"]))
    latents = nn.parameter("latent_sample", [-1, config["latent_channels"], -1, -1])
    x = latents
    if config.get("use_post_quant_conv", True):
        x = w.conv("post_quant_conv", x, config["latent_channels"], kernel=1)
    x = w.conv("decoder.conv_in", x, channels[0])
    x = block.mid("decoder.mid_block", x)
    for i, width in enumerate(channels):
        name = f"decoder.up_blocks.{i}"
        for j in range(config.get("layers_per_block", 1) + 1):
            x = block.resnet(f"{name}.resnets.{j}", x, width)
        if i < len(channels) - 1:
            x = w.conv(f"{name}.upsamplers.0.conv", nn.upsample(x), width)
    x = nn.silu(block.norm("decoder.conv_norm_out", x))
    x = w.conv("decoder.conv_out", x, config.get("out_channels", 3))
    return nn.model("vae_decoder", [latents], {"sample": x}, w)


def vae_encoder(
    config: Mapping[str, Any], tensors: Tensors, *, structure: Structure | None = None
) -> ov.Model:
    """Return the encoder: ``sample`` f32 [N, 3, H, W] -> ``latent_parameters`` f32 [N, 2C, h, w].

    The parameters are means, then log variances. Otherwise as `vae_decoder`.
    """
    w = _half(config, tensors, structure, ("encoder.", "quant_conv."))
    block = _Blocks(w, config)
    channels = config["block_out_channels"]
    picture = nn.parameter("sample", [-1, config.get("in_channels", 3), -1, -1])
    x = w.conv("encoder.conv_in", picture, channels[0])
    for i, width in enumerate(channels):
        name = f"encoder.down_blocks.{i}"
        for j in range(config.get("layers_per_block", 1)):
            x = block.resnet(f"{name}.resnets.{j}", x, width)
        if i < len(channels) - 1:
            x = w.conv(f"{name}.downsamplers.0.conv", x, width, stride=2, pads=(0, 1))
    x = block.mid("encoder.mid_block", x)
    x = nn.silu(block.norm("encoder.conv_norm_out", x))
    both = 2 * config["latent_channels"]
    x = w.conv("encoder.conv_out", x, both)
    if config.get("use_quant_conv", True):
        x = w.conv("quant_conv", x, both, kernel=1)
    return nn.model("vae_encoder", [picture], {"latent_parameters": x}, w)


class _Blocks:
    """The blocks of both halves."""

    def __init__(self, w: Layers, config: Mapping[str, Any]) -> None:
        self.w = w
        self.groups = int(config.get("norm_num_groups", 32))
        self.attends = bool(config.get("mid_block_add_attention", True))

    def mid(self, name: str, x: Value) -> Value:
        width = nn.channels_of(x)
        x = self.resnet(f"{name}.resnets.0", x, width)
        if self.attends:
            x = self.attention(f"{name}.attentions.0", x)
        return self.resnet(f"{name}.resnets.1", x, width)

    def norm(self, name: str, x: Value) -> Value:
        return self.w.group_norm(name, x, self.groups, _EPS)

    def resnet(self, name: str, x: Value, channels: int) -> Value:
        w = self.w
        h = w.conv(f"{name}.conv1", nn.silu(self.norm(f"{name}.norm1", x)), channels)
        h = w.conv(f"{name}.conv2", nn.silu(self.norm(f"{name}.norm2", h)), channels)
        if nn.channels_of(x) != channels:
            x = w.conv(f"{name}.conv_shortcut", x, channels, kernel=1)
        return ops.add(x, h, name=name)

    def attention(self, name: str, x: Value) -> Value:
        """Return x plus what each pixel finds in all others; one head."""
        w, width = self.w, nn.channels_of(x)
        tokens = nn.to_tokens(self.norm(f"{name}.group_norm", x))
        q, k, v = (w.linear(f"{name}.to_{part}", tokens, width) for part in "qkv")
        found = w.linear(f"{name}.to_out.0", nn.attention(q, k, v, 1, name=name), width)
        return ops.add(nn.to_picture(found, like=x), x, name=f"{name}/residual")


def _half(
    config: Mapping[str, Any],
    tensors: Tensors,
    structure: Structure | None,
    prefixes: tuple[str, ...],
) -> Layers:
    """Return the layers of one half of the autoencoder."""
    for key, kind in _BLOCKS.items():
        other = set(config.get(key, ())) - {kind}
        if other:
            raise UnknownNetwork(f"an autoencoder with {str(min(other))[:60]}")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise UnknownNetwork(f"an autoencoder with act_fn {str(config['act_fn'])[:60]}")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return Layers(own, None if structure is None else structure.within(prefixes))
