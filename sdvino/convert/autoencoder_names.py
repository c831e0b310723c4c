"""What the tensors of an autoencoder are called, in diffusers' naming and in the original ones.

A file without a config is understood by its tensors alone: the config is read off their shapes, and
what that config needs is held against what the file has, so that nothing is missing or left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Old names of diffusers' attention, and those of the original code.
_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_ORIGINAL_PREFIX = "first_stage_model."
_ORIGINAL = re.compile(r"(?:first_stage_model\.)?(?:encoder\.down|decoder\.up)\.\d+\.")
_BLOCK = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)\.(?P<block>\d+)\."
    r"(?:block\.(?P<number>\d+)|(?P<sampler>downsample|upsample))\.(?P<rest>.+)"
)
_MIDDLE = re.compile(
    r"(?P<side>encoder|decoder)\.mid\.(?P<part>block_1|attn_1|block_2)\.(?P<rest>.+)"
)
_PARTS = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def is_original(names: Iterable[str]) -> bool:
    """Return whether an autoencoder is named as in CompVis' code (AutoencoderKL of ldm)."""
    return any(_ORIGINAL.match(name) for name in names)


def from_original(names: Iterable[str]) -> dict[str, str]:
    """Return the original code's names -> diffusers' names, for those of an autoencoder.

    Of a whole checkpoint only ``first_stage_model.`` is looked at. Training's own tensors (the
    loss, an average) are left out. Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules.
    """
    names = list(names)
    prefix = _ORIGINAL_PREFIX if any(n.startswith(_ORIGINAL_PREFIX) for n in names) else ""
    inner = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    inner = {n: t for n, t in inner.items() if not t.startswith(("loss.", "model_ema."))}
    ups = {int(m["block"]) for t in inner.values() if (m := _BLOCK.match(t)) and "up" in m["side"]}
    return {name: _original(theirs, max(ups, default=0)) for name, theirs in inner.items()}


def _original(name: str, last_up: int) -> str:
    if match := _BLOCK.fullmatch(name):
        up = match["side"] == "decoder.up"
        # Going up, the original code counts its blocks from the picture.
        block = last_up - int(match["block"]) if up else int(match["block"])
        side = f"decoder.up_blocks.{block}" if up else f"encoder.down_blocks.{block}"
        if match["sampler"] is not None:
            return f"{side}.{match['sampler']}rs.0.{match['rest']}"
        rest = match["rest"].replace("nin_shortcut.", "conv_shortcut.")
        return f"{side}.resnets.{match['number']}.{rest}"
    if match := _MIDDLE.fullmatch(name):
        stem = f"{match['side']}.mid_block.{_PARTS[match['part']]}"
        return modern(f"{stem}.{match['rest']}")
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)


def modern(name: str) -> str:
    """Return the name that diffusers gives today to the middle's attention."""
    stem, found, rest = name.partition(".mid_block.attentions.0.")
    old, dot, leaf = rest.rpartition(".")
    return f"{stem}{found}{_ATTENTION.get(old, old)}{dot}{leaf}" if found else name


def modern_shape(name: str, shape: Shape) -> Shape:
    """Return a shape as diffusers has it: the middle's attention is linear, not 1 x 1."""
    return shape[:2] if ".attentions." in name and shape[2:] == (1, 1) else shape


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


_NUMBERED = re.compile(r"\d+\..+")


def from_taesd(names: Iterable[str], side: str) -> dict[str, str]:
    """Return TAESD's own names -> diffusers', for its ``side``: encoder or decoder.

    TAESD's decoder has a clamp in front, which diffusers does not count among the layers; its own
    files are two plain sequences. Source: madebyollin/taesd, taesd.py.
    """
    names = [name for name in names if _NUMBERED.fullmatch(name)]
    shift = 1 if side == "decoder" and not any(name.startswith("0.") for name in names) else 0
    found = {}
    for name in names:
        number, _, rest = name.partition(".")
        found[name] = f"{side}.layers.{int(number) - shift}.{rest}"
    return found


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
