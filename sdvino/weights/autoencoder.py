"""Autoencoders without a config: it is read off their tensors, and nothing may be missing.

The config's own tensors are held against what there is: none missing, left over or of another
shape. What shapes do not tell (groups of the norms, scaling) a config read so leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from sdvino.errors import RequestError
from sdvino.weights.layouts.rename import listed
from sdvino.weights.safetensors import Shape, Tensors

Shapes: TypeAlias = Mapping[str, Shape]


def read_kl(tensors: Tensors, where: object) -> dict[str, Any]:
    """Return the config of the AutoencoderKL that ``tensors`` are, which ``where`` holds.

    Raises RequestError, in one sentence, when they are none, or not a whole one.
    """
    return _read(tensors, where, "AutoencoderKL", kl_config, kl_tensors)


def read_tiny(tensors: Tensors, where: object) -> dict[str, Any]:
    """Return the config of the AutoencoderTiny that ``tensors`` are; see `read_kl`."""
    return _read(tensors, where, "AutoencoderTiny", tiny_config, tiny_tensors)


def differing(tensors: Tensors, expected: Shapes) -> list[str]:
    """Return the names that only one of the two has, or with another shape, sorted."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )


def _read(
    tensors: Tensors,
    where: object,
    what: str,
    config_of: Callable[[Shapes], dict[str, Any]],
    tensors_of: Callable[[Mapping[str, Any]], dict[str, Shape]],
) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = config_of(shapes)
        expected = tensors_of(config)
    except (KeyError, IndexError) as error:
        raise RequestError(
            f"{where} holds no {what} ({listed(sorted(shapes))} are in it);"
            " give the file of one, encoder and decoder together."
        ) from error
    wrong = differing(tensors, expected)
    if wrong:
        raise RequestError(
            f"{where} is no whole {what}: tensors are missing, left over or of another shape"
            f" ({listed(wrong)}); download it again or choose another."
        )
    return config


def kl_config(shapes: Shapes) -> dict[str, Any]:
    """Return the config of an AutoencoderKL off its tensors; raises KeyError without the main ones.

    What shapes do not tell (groups of the norms, scaling) is left out.
    """
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in shapes:
        widths.append(shapes[name][0])
    layers = 0
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in shapes:
        layers += 1
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in shapes),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def kl_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the names and shapes that an AutoencoderKL with this config has."""
    latent, layers = config["latent_channels"], config["layers_per_block"]
    attention = config["mid_block_add_attention"]
    down = list(config["block_out_channels"])
    up = down[::-1]
    found: dict[str, Shape] = {}
    for name, outputs, inputs in (
        ("encoder.conv_in", down[0], config["in_channels"]),
        ("encoder.conv_out", 2 * latent, down[-1]),
        ("decoder.conv_in", up[0], latent),
        ("decoder.conv_out", config["out_channels"], up[-1]),
    ):
        found |= _conv(name, outputs, inputs, 3)
    for side, widths, count, sampler in (
        ("encoder.down_blocks", down, layers, "downsamplers"),
        ("decoder.up_blocks", up, layers + 1, "upsamplers"),
    ):
        for i, width in enumerate(widths):
            for j in range(count):
                before = widths[max(i - 1, 0)] if j == 0 else width
                found |= _resnet(f"{side}.{i}.resnets.{j}", before, width)
            if i < len(widths) - 1:
                found |= _conv(f"{side}.{i}.{sampler}.0.conv", width, width, 3)
    for side, last in (("encoder", down[0]), ("decoder", down[0])):
        found |= _middle(f"{side}.mid_block", down[-1], attention)
        found |= _norm(f"{side}.conv_norm_out", down[-1] if side == "encoder" else last)
    if config["use_quant_conv"]:
        found |= _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config["use_post_quant_conv"]:
        found |= _conv("post_quant_conv", latent, latent, 1)
    return found


def _middle(stem: str, width: int, attention: bool) -> dict[str, Shape]:
    found = _resnet(f"{stem}.resnets.0", width, width)
    found |= _resnet(f"{stem}.resnets.1", width, width)
    if attention:
        found |= _norm(f"{stem}.attentions.0.group_norm", width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found[f"{stem}.attentions.0.{name}.weight"] = (width, width)
            found[f"{stem}.attentions.0.{name}.bias"] = (width,)
    return found


def _resnet(stem: str, before: int, width: int) -> dict[str, Shape]:
    found = {**_norm(f"{stem}.norm1", before), **_norm(f"{stem}.norm2", width)}
    found |= _conv(f"{stem}.conv1", width, before, 3) | _conv(f"{stem}.conv2", width, width, 3)
    if before != width:
        found |= _conv(f"{stem}.conv_shortcut", width, before, 1)
    return found


def _norm(stem: str, width: int) -> dict[str, Shape]:
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


def _conv(stem: str, outputs: int, inputs: int, kernel: int, bias: bool = True) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{stem}.weight": (outputs, inputs, kernel, kernel)}
    return found | {f"{stem}.bias": (outputs,)} if bias else found


def tiny_config(shapes: Shapes) -> dict[str, Any]:
    """Return the config of an AutoencoderTiny off its tensors; raises KeyError without them."""
    encoder_blocks, encoder_widths = _stages(shapes, "encoder")
    decoder_blocks, decoder_widths = _stages(shapes, "decoder")
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": shapes["encoder.layers.0.weight"][1],
        "out_channels": shapes[_last(shapes, "decoder")][0],
        "latent_channels": shapes["decoder.layers.0.weight"][1],
        "num_encoder_blocks": encoder_blocks,
        "num_decoder_blocks": decoder_blocks,
        "encoder_block_out_channels": encoder_widths,
        "decoder_block_out_channels": decoder_widths,
    }


def tiny_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the names and shapes that an AutoencoderTiny with this config has."""
    found: dict[str, Shape] = {}
    place = 0
    stages = zip(config["num_encoder_blocks"], config["encoder_block_out_channels"], strict=True)
    for i, (blocks, width) in enumerate(stages):
        before = config["in_channels"] if i == 0 else width
        found |= _conv(f"encoder.layers.{place}", width, before, 3, bias=i == 0)
        found |= _tiny_blocks("encoder", place + 1, blocks, width)
        place += 1 + blocks
    widths = config["encoder_block_out_channels"]
    found |= _conv(f"encoder.layers.{place}", config["latent_channels"], widths[-1], 3)
    widths = config["decoder_block_out_channels"]
    found |= _conv("decoder.layers.0", widths[0], config["latent_channels"], 3)
    place = 2  # an activation stands between
    for i, (blocks, width) in enumerate(zip(config["num_decoder_blocks"], widths, strict=True)):
        last = i == len(widths) - 1
        found |= _tiny_blocks("decoder", place, blocks, width)
        place += blocks + (not last)  # the upsampling has no weights
        outputs = config["out_channels"] if last else width
        found |= _conv(f"decoder.layers.{place}", outputs, width, 3, bias=last)
        place += 1
    return found


def _tiny_blocks(side: str, start: int, count: int, width: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for place in range(start, start + count):
        for layer in (0, 2, 4):
            found |= _conv(f"{side}.layers.{place}.conv.{layer}", width, width, 3)
    return found


_TINY = re.compile(r"(?P<side>encoder|decoder)\.layers\.(?P<place>\d+)\.(?P<rest>.+)")


def _layers(shapes: Shapes, side: str) -> Iterator[tuple[int, bool]]:
    """Yield the place of each layer that has weights, and whether it is a block."""
    blocks: dict[int, bool] = {}
    for name in shapes:
        match = _TINY.fullmatch(name)
        if match and match["side"] == side:
            place = int(match["place"])
            blocks[place] = blocks.get(place, False) or match["rest"].startswith("conv.")
    yield from sorted(blocks.items())


def _stages(shapes: Shapes, side: str) -> tuple[list[int], list[int]]:
    """Return how many blocks each stage has, and its width: stages are what convolutions part."""
    layers = list(_layers(shapes, side))[1:]
    counts, widths = [0], [shapes[f"{side}.layers.0.weight"][0]]
    for place, block in layers:
        if block:
            counts[-1] += 1
            widths[-1] = shapes[f"{side}.layers.{place}.conv.0.weight"][0]
        else:
            counts.append(0)
            widths.append(shapes[f"{side}.layers.{place}.weight"][0])
    return counts[:-1], widths[:-1]  # behind the last convolution there is nothing


def _last(shapes: Shapes, side: str) -> str:
    place = max((place for place, _ in _layers(shapes, side)), default=0)
    return f"{side}.layers.{place}.weight"
