"""AutoencoderTiny's decoder: TAESD (github.com/madebyollin/taesd), a list of small convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov
from openvino import opset13 as ops

from sdvino.nets import layers as nn
from sdvino.nets.layers import Layers, UnknownNetwork, Value
from sdvino.weights.safetensors import Tensors

_KNOWN: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


def tiny_vae(config: Mapping[str, Any], tensors: Tensors) -> ov.Model:
    """Return the decoder: ``latent_sample`` f32 [N, C, h, w] -> ``sample`` f32 [N, 3, H, W].

    Latents are scaled as the pipeline's are, the picture is in [-1, 1]. ``config`` is diffusers'
    config.json of an AutoencoderTiny. Raises RequestError when config and tensors do not fit,
    UnknownNetwork for other networks.
    """
    for key, known in _KNOWN.items():
        if config.get(key, known[0]) not in known:
            raise UnknownNetwork(f"a tiny autoencoder with {key} {str(config[key])[:60]}")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    w = Layers(own)
    blocks = config.get("num_decoder_blocks", (3, 3, 3, 1))
    widths = config.get("decoder_block_out_channels", (64,) * len(blocks))
    latents = nn.parameter("latent_sample", [-1, config.get("latent_channels", 4), -1, -1])
    x = ops.multiply(ops.tanh(ops.divide(latents, nn.number(3))), nn.number(3))
    x = ops.relu(w.conv("decoder.layers.0", x, widths[0]))
    layer = 2  # number 1 is the ReLU
    for i, count in enumerate(blocks):
        for _ in range(count):
            x = _block(w, f"decoder.layers.{layer}", x, widths[i])
            layer += 1
        last = i == len(blocks) - 1
        if not last:
            x = nn.upsample(x)
            layer += 1
        outputs = config.get("out_channels", 3) if last else widths[i]
        x = w.conv(f"decoder.layers.{layer}", x, outputs, bias=last)
        layer += 1
    picture = ops.subtract(ops.multiply(x, nn.number(2)), nn.number(1))
    return nn.model("tiny_vae", [latents], {"sample": picture}, w)


def _block(w: Layers, name: str, x: Value, channels: int) -> Value:
    """Return relu(x + F(x)), three convolutions."""
    h = ops.relu(w.conv(f"{name}.conv.0", x, channels))
    h = ops.relu(w.conv(f"{name}.conv.2", h, channels))
    h = w.conv(f"{name}.conv.4", h, channels)
    if nn.channels_of(x) != channels:
        x = w.conv(f"{name}.skip", x, channels, kernel=1, bias=False)
    return ops.relu(ops.add(h, x))
