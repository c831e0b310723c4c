"""The names that LoRA files give to the layers of a model.

Layouts differ in their prefixes (kohya's ``lora_unet_``, diffusers' ``unet.``), in the words behind
the layer (``lora_down``, ``lora.down``, ``lora_A``, ``processor.to_q_lora.down``; LyCORIS writes
``hada_w1_a`` and ``lokr_w1``, too) and, for the
UNet, in how blocks are numbered: diffusers' ``down_blocks.1.attentions.0`` is ``input_blocks.4.1``
in the original code that kohya's SDXL files follow. All are brought to one *spelling*: the layer's
name with underscores for dots, which is what kohya writes and loses least.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sdvino.weights.layouts.original import RESNET, UNET_ENDS

Layout = Literal["kohya", "diffusers", "PEFT"]

#: Components that a LoRA can change, as the sub-folders of a diffusers folder are called.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("diffusion_model.", "unet"),
    ("text_model.", "text_encoder"),
)
# PEFT wraps the model it trains.
_WRAPPER = "base_model.model."
# Word of a layout -> what the tensor is for; LyCORIS' own words (hada_w1_a ...) stay.
_ROLES = {
    "down": "down",
    "A": "down",
    "up": "up",
    "B": "up",
    "mid": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
# Old diffusers put the word behind the layer's name with an underscore, in the attention processor.
_WORDS = r"(?:\.lora_linear_layer|\.lora|_lora)"
# A PEFT file that was not saved through save_pretrained names the adapter too.
_ADAPTER = r"(?:\.[A-Za-z]\w{0,63})?"
_PATTERNS = (
    re.compile(rf"(?P<layer>.+?){_WORDS}\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<layer>.+?)\.lora_(?P<role>down|up|mid)\.weight"),
    re.compile(rf"(?P<layer>.+?)\.lora_(?P<role>A|B){_ADAPTER}\.weight"),
    re.compile(rf"(?P<layer>.+?){_WORDS}?\.(?P<role>alpha|dora_scale)"),
    re.compile(rf"(?P<layer>.+?)\.(?P<role>lora_magnitude_vector){_ADAPTER}"),
    re.compile(r"(?P<layer>.+?)\.(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"),
)
_MAX_NAME = 300
_SGM_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")


@dataclass(frozen=True, slots=True)
class LoraKey:
    """What one tensor of a LoRA file is."""

    component: str
    spelling: str
    #: down, up, mid, alpha, magnitude, or LyCORIS' word.
    role: str
    layout: Layout
    #: The layer's name as the file writes it, without the component.
    layer: str


def parse_key(name: str) -> LoraKey | None:
    """Return what the tensor ``name`` is, or None when no layout writes such a name."""
    if len(name) > _MAX_NAME:
        return None
    match = next((m for pattern in _PATTERNS if (m := pattern.fullmatch(name))), None)
    if match is None:
        return None
    layer = match["layer"].removeprefix(_WRAPPER)
    component = "unet"
    kohya = False
    for prefix, owner in _PREFIXES:
        if layer.startswith(prefix):
            component, kohya = owner, prefix.startswith("lora_")
            if prefix != "text_model.":
                layer = layer.removeprefix(prefix).removeprefix(_WRAPPER)
            break
    peft = match["role"] in ("A", "B", "lora_magnitude_vector")
    return LoraKey(
        component=component,
        spelling=_spell(layer),
        role=_ROLES.get(match["role"], match["role"]),
        layout="kohya" if kohya else "PEFT" if peft else "diffusers",
        layer=layer,
    )


def is_sgm(spelling: str) -> bool:
    """Return whether ``spelling`` numbers the UNet's blocks as the original code does."""
    return spelling.startswith(_SGM_BLOCKS)


def spellings(component: str, layers: Iterable[str]) -> dict[str, str]:
    """Return every spelling of the ``layers`` (dotted names) of ``component`` -> the layer."""
    layers = list(layers)
    found = {_spell(layer): layer for layer in layers}
    if component == "unet":
        for theirs, layer in _sgm_names(layers):
            found.setdefault(_spell(theirs), layer)
        for layer in layers:  # the attention processors' to_out_lora
            if layer.endswith(".to_out.0"):
                found.setdefault(_spell(layer.removesuffix(".0")), layer)
    else:
        for layer in layers:  # and theirs for the text encoder, which has other words
            stem, _, last = layer.rpartition(".")
            if last in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found.setdefault(_spell(f"{stem}.to_{last.removesuffix('_proj')}"), layer)
    return found


def _spell(layer: str) -> str:
    """Return the common spelling. transformers 5 drops ``text_model`` from the names of layers."""
    flat = layer.replace(".", "_").replace("_processor_", "_")
    return flat.removeprefix("text_model_")


_SGM_OUTSIDE = {ours: theirs for theirs, ours in UNET_ENDS.items()}
_SGM_RESNET = {ours: theirs for theirs, ours in RESNET.items()}
_SGM_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<part>(?:resnets|attentions)\.\d+)\.(?P<rest>.+)")


def _sgm_names(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name in the original code, layer) for the layers of a UNet.

    The original code counts resnets and samplers of one side in a single list of blocks, each a
    list of a resnet (0), a transformer (1) and, going up, an upsampler behind them.
    Source: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py.
    """
    layers = list(layers)
    blocks = [match for layer in layers if (match := _BLOCK.fullmatch(layer))]
    first = {side: _first_blocks(side, blocks) for side in ("down", "up")}
    with_attention = {
        (match["side"], match["block"]) for match in blocks if match["kind"] == "attentions"
    }
    for layer in layers:
        if layer in _SGM_OUTSIDE:
            yield _SGM_OUTSIDE[layer], layer
        elif match := _MIDDLE.fullmatch(layer):
            if match["part"] in _SGM_MIDDLE:
                where = f"middle_block.{_SGM_MIDDLE[match['part']]}"
                yield f"{where}.{_rest(match['part'], match['rest'])}", layer
        elif match := _BLOCK.fullmatch(layer):
            side, number, kind = match["side"], int(match["number"]), match["kind"]
            start, resnets = first[side][int(match["block"])]
            inner = "0" if kind == "resnets" else "1"
            rest = _rest(kind, match["rest"])
            if kind == "downsamplers":
                number, inner, rest = resnets, "0", "op"
            elif kind == "upsamplers":
                number = resnets - 1
                inner = "2" if (side, match["block"]) in with_attention else "1"
            side_name = "input_blocks" if side == "down" else "output_blocks"
            yield f"{side_name}.{start + number}.{inner}.{rest}", layer


def _rest(kind: str, rest: str) -> str:
    return _SGM_RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _first_blocks(side: str, blocks: Iterable[re.Match[str]]) -> dict[int, tuple[int, int]]:
    """Return block -> (where it starts in the original's list, how many resnets it has)."""
    resnets: dict[int, set[int]] = {}
    sampled: set[int] = set()
    for match in blocks:
        if match["side"] == side:
            block = int(match["block"])
            numbers = resnets.setdefault(block, set())
            if match["kind"] == "resnets":
                numbers.add(int(match["number"]))
            elif match["kind"] == "downsamplers":
                sampled.add(block)
    result = {}
    start = 1 if side == "down" else 0  # input_blocks.0 is conv_in
    for block in sorted(resnets):
        result[block] = (start, len(resnets[block]))
        start += len(resnets[block]) + (block in sampled)
    return result
