"""Which layers stay in float when a component is quantized, by their names in diffusers.

The first and last convolutions, the time embeddings and the residual shortcuts carry the
picture's coarse signal and cost next to nothing in time; 8 bits in them cost most of the quality
(NVIDIA ModelOpt's recipe for SDXL keeps the same ones; Q-Diffusion, arXiv:2302.04304).

conv_shortcut: Q-Diffusion would rather split it by source, the block's input and the skip, with
scales of their own. Measured on the demo's UNet (scripts/measure_choices.py; 96 calibration inputs,
the error of the prediction on 48 of other prompts and seeds): in float 3.5 %, quantized whole
4.8 %, split by source and quantized 4.9 %. So it stays in float.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from sdvino.errors import RequestError

if TYPE_CHECKING:
    from sdvino.compress.component_recipe import ComponentRecipe


def _modules(*names: str) -> tuple[str, ...]:
    """Return one expression for modules, by the ends of their dotted names.

    A module is called "up_blocks.1.resnets.0.conv_shortcut" in diffusers, and its operation
    "__module.up_blocks.1.resnets.0.conv_shortcut/aten::_convolution/Convolution" as
    optimum-intel exports it (older exports write slashes for dots). One that was made low-rank is
    two: "conv_shortcut.down" and "conv_shortcut.up".
    """
    return (rf"(^|[./])({'|'.join(names)})([./](down|up))?(/|$)",)


#: Component -> regular expressions, to be searched in the names of its operations.
FRAGILE_LAYERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": _modules(
            "conv_in",
            "conv_out",
            r"time_embedding\.\w+",
            "time_emb_proj",
            r"add_embedding\.\w+",
            r"class_embedding(\.\w+)?",
            "conv_shortcut",
        ),
        "vae_decoder": _modules("post_quant_conv", "conv_in", "conv_out", "conv_shortcut"),
        "vae_encoder": _modules("quant_conv", "conv_in", "conv_out", "conv_shortcut"),
    }
)


def is_fragile(component: str, node: str) -> bool:
    """Tell whether the operation called ``node`` of ``component`` is one of the fragile ones."""
    return any(re.search(layers, node) for layers in FRAGILE_LAYERS.get(component, ()))


def fragile_nodes(component: str, nodes: Iterable[str]) -> list[str]:
    """Return the fragile ones among ``nodes`` (operations with weights, in graph order)."""
    names = list(nodes)
    if component == "tiny_vae":
        return sorted({names[0], names[-1]}) if names else []
    return [name for name in names if is_fragile(component, name)]


def float_nodes(
    recipe: ComponentRecipe,
    component: str,
    weighted: Sequence[str],
    others: Sequence[str] = (),
    rest: Sequence[str] = (),
) -> list[str]:
    """Return the names of the operations that stay in float.

    ``weighted`` are the names of those with weights, in graph order; ``others`` those that can be
    compressed without; ``rest`` every operation, where an expression is at home that matches none
    of the former. Raises RequestError for a regular expression that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in recipe.float_layers:
        matching = _matching(pattern, [*weighted, *others])
        if not matching:
            matching = _matching(pattern, rest)
        if not matching:
            raise RequestError(
                f"float_layers of {component} has {pattern!r}, which matches no layer of this"
                " model; correct it or leave it out."
            )
        found |= dict.fromkeys(matching)
    if recipe.float_ends and weighted:
        found |= dict.fromkeys((weighted[0], weighted[-1]))
    return list(found)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.search(pattern, name)]
