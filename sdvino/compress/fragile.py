"""Which layers stay in float when a component is quantized, by their names in diffusers.

The first and last convolutions, the time embeddings and the residual shortcuts carry the
picture's coarse signal and cost next to nothing in time; 8 bits in them cost most of the quality
(NVIDIA ModelOpt's recipe for SDXL keeps the same ones; Q-Diffusion, arXiv:2302.04304).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import MappingProxyType

# A name of diffusers' modules, such as "up_blocks.1.resnets.0.conv_shortcut". optimum-intel's
# export keeps it: "__module.up_blocks.1.resnets.0.conv_shortcut/aten::_convolution/Convolution".
_MODULES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": (
            r"conv_in",
            r"conv_out",
            r"time_proj",
            r"time_embedding\.\w+",
            r"time_emb_proj",
            r"add_embedding\.\w+",
            r"class_embedding(\.\w+)?",
            r"conv_shortcut",
        ),
        "vae_decoder": (r"post_quant_conv", r"conv_in", r"conv_out", r"conv_shortcut"),
        "vae_encoder": (r"quant_conv", r"conv_in", r"conv_out", r"conv_shortcut"),
        # AutoencoderTiny's decoder is a flat list of layers: the first and last convolutions
        # are found by their position.
        "tiny_vae": (),
    }
)


def is_fragile(component: str, node: str) -> bool:
    """Tell whether the operation called ``node`` of ``component`` is kept in float."""
    modules = _MODULES.get(component, ())
    return any(re.search(rf"(^|\.){module}(/|$)", node) for module in modules)


def fragile_nodes(component: str, nodes: Iterable[str]) -> list[str]:
    """Return the names among ``nodes`` (operations with weights, in order) kept in float."""
    names = list(nodes)
    if component == "tiny_vae":
        return sorted({names[0], names[-1]}) if names else []
    return [name for name in names if is_fragile(component, name)]
