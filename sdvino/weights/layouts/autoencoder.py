"""What the tensors of an autoencoder are called, put into diffusers' naming of today.

AutoencoderKL as CompVis' code has it and as diffusers had it before 0.15, and TAESD's own files.
Source: ldm/modules/diffusionmodules/model.py of CompVis/latent-diffusion.
"""

from __future__ import annotations

import re

from sdvino.weights.layouts.rename import rename, under
from sdvino.weights.numbers import reshaped
from sdvino.weights.safetensors import Tensor, Tensors

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
_PREFIX = "first_stage_model."
_BLOCK = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)\.(?P<block>\d{1,2})\."
    r"(?:block\.(?P<number>\d{1,2})|(?P<sampler>downsample|upsample))\.(?P<rest>.+)"
)
_MIDDLE = re.compile(
    r"(?P<side>encoder|decoder)\.mid\.(?P<part>block_1|attn_1|block_2)\.(?P<rest>.+)"
)
_PARTS = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_MIDDLE_ATTENTION = ".mid_block.attentions.0."


def current(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of an AutoencoderKL in diffusers' naming, whatever they are called now.

    Of a whole checkpoint only ``first_stage_model.`` is looked at. Training's own tensors (the
    loss, an average) are left out. Names that nothing is known of stay. Raises LayoutError for two
    tensors of the same name.
    """
    inner = under(tensors, _PREFIX)
    inner = {
        name: tensor
        for name, tensor in (inner if inner else tensors).items()
        if not name.startswith(("loss.", "model_ema."))
    }
    ups = [int(m["block"]) for name in inner if (m := _BLOCK.match(name)) and "up" in m["side"]]
    found = rename(inner, lambda name: _current(name, max(ups, default=0)))
    return {name: _linear(name, tensor) for name, tensor in found.items()}


def _current(name: str, last_up: int) -> str:
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
        name = f"{match['side']}.mid_block.{_PARTS[match['part']]}.{match['rest']}"
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    stem, found, rest = name.partition(_MIDDLE_ATTENTION)
    old, dot, leaf = rest.rpartition(".")
    return f"{stem}{found}{_ATTENTION.get(old, old)}{dot}{leaf}" if found else name


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Return the middle's attention as linear layers, which was written with convolutions."""
    flat = _MIDDLE_ATTENTION in name and tensor.shape[2:] == (1, 1)
    return reshaped(tensor, tensor.shape[:2]) if flat else tensor


_NUMBERED = re.compile(r"\d{1,3}\..+")


def taesd_tensors(tensors: Tensors, side: str) -> dict[str, Tensor]:
    """Return the tensors of TAESD's own file of a ``side`` (encoder, decoder), as diffusers'.

    TAESD's decoder has a clamp in front, which diffusers does not count among the layers; its own
    files are two plain sequences. Source: madebyollin/taesd, taesd.py.
    """
    kept = {name: tensor for name, tensor in tensors.items() if _NUMBERED.fullmatch(name)}
    shift = 1 if side == "decoder" and not any(name.startswith("0.") for name in kept) else 0

    def name_of(name: str) -> str:
        number, _, rest = name.partition(".")
        return f"{side}.layers.{int(number) - shift}.{rest}"

    return rename(kept, name_of)
