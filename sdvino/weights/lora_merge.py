"""LoRAs merged into the tensors of a component, each tensor when it is read.

W becomes W + weight * alpha / rank * up @ down, in float32. Whether a LoRA fits is decided from
headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sdvino.errors import RequestError
from sdvino.weights.layouts.lora import COMPONENTS, spellings
from sdvino.weights.layouts.rename import listed
from sdvino.weights.lora import Lora
from sdvino.weights.lora_part import LoraPart
from sdvino.weights.numbers import Array, as_float32
from sdvino.weights.safetensors import Shape, Tensor, Tensors

# The width of the text that cross-attention reads tells the families apart.
_FAMILIES = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}
# Component -> layer -> shape of its weight.
_Layers = Mapping[str, Mapping[str, Shape]]


def merge(tensors: Tensors, loras: Sequence[Lora], component: str) -> dict[str, Tensor]:
    """Return the ``tensors`` of ``component`` with ``loras`` added to its weights.

    A merged weight is worked out when it is read, in float32, from the weights as they were, so
    the LoRAs' order is of no account; it is F32 where it was (or F64), else F16. DoRA
    (arXiv:2402.09353) is applied in full at weight 1, and in part in between. Raises RequestError
    when a part does not fit; reading a weight raises it when the result overflows.
    """
    merged = dict(tensors)
    if component not in COMPONENTS:
        return merged
    layers = {component: weights_of(tensors)}
    tables = _tables(layers)
    parts: dict[str, list[tuple[Lora, LoraPart]]] = {}
    for lora in loras:
        for (_, layer), part in _assign(lora, layers, tables)[0].items():
            if lora.weight:
                parts.setdefault(layer, []).append((lora, part))
    for layer, entries in parts.items():
        name = f"{layer}.weight"
        merged[name] = _merged(layer, tensors[name], entries)
    return merged


def check_loras(loras: Iterable[Lora], tensors: Mapping[str, Tensors]) -> tuple[str, ...]:
    """Hold ``loras`` against the model; return sentences about what of them fits nothing.

    tensors: component -> its tensors. Raises RequestError for a LoRA of another family: none of it
    fits, or a layer of the same name has another shape.
    """
    layers = {name: weights_of(own) for name, own in tensors.items() if name in COMPONENTS}
    tables = _tables(layers)
    warnings = []
    for lora in loras:
        found, left_out = _assign(lora, layers, tables)
        if not found:
            raise RequestError(_other_family(lora, layers, None))
        left_out = [*lora.unknown, *left_out]
        if left_out:
            one = len(left_out) == 1
            warnings.append(
                f"{len(left_out)} tensor{'' if one else 's'} of the LoRA {lora.name}"
                f" fit{'s' if one else ''} nothing in this model and"
                f" {'is' if one else 'are'} left out: {listed(left_out)}."
            )
    return tuple(warnings)


def hints(loras: Iterable[Lora]) -> tuple[str, ...]:
    """Return what to add to the command for LoRAs that want other settings than the model's."""
    return tuple(
        f"The LoRA {lora.name} looks like an LCM-LoRA: such a model works best with"
        " --suggest steps=4,guidance=1,scheduler=lcm."
        for lora in loras
        if lora.is_lcm and lora.weight
    )


def weights_of(tensors: Tensors) -> dict[str, Shape]:
    """Return layer -> shape of its weight, for those that a LoRA can change."""
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) in (2, 4)
    }


def _tables(layers: _Layers) -> dict[str, dict[str, str]]:
    return {component: spellings(component, own) for component, own in layers.items()}


def _assign(
    lora: Lora, layers: _Layers, tables: Mapping[str, Mapping[str, str]]
) -> tuple[dict[tuple[str, str], LoraPart], list[str]]:
    """Return component and layer -> the part for it, and the tensors that fit none."""
    found: dict[tuple[str, str], LoraPart] = {}
    left_out: list[str] = []
    for part in lora.parts:
        layer = tables.get(part.component, {}).get(part.spelling)
        if layer is None or (part.component, layer) in found:
            left_out.extend(part.names)
            continue
        if not part.fits(layers[part.component][layer]):
            raise RequestError(_other_family(lora, layers, (part, layer)))
        found[part.component, layer] = part
    return found, left_out


def _other_family(lora: Lora, layers: _Layers, misfit: tuple[LoraPart, str] | None) -> str:
    theirs = {part.shape[1] for part in lora.parts if part.spelling.endswith("attn2_to_k")}
    unet = layers.get("unet", {})
    ours = {shape[1] for name, shape in unet.items() if name.endswith("attn2.to_k")}
    if theirs and ours and theirs != ours:
        return (
            f"The LoRA {lora.path} is for {_family(theirs)}, and this model is {_family(ours)};"
            " choose a LoRA for the same family."
        )
    if misfit is not None:
        part, layer = misfit
        return (
            f"The LoRA {lora.path} is for another model: its {layer} is {list(part.shape)} and"
            f" here it is {list(layers[part.component][layer])}; choose one for this family."
        )
    names = [name for part in lora.parts for name in part.names]
    return (
        f"Nothing in the LoRA {lora.path} fits this model ({listed(names)});"
        " choose a LoRA for the same family."
    )


def _family(widths: Iterable[int]) -> str:
    width = max(widths)
    return _FAMILIES.get(width, f"a model with text {width} wide")


def _merged(layer: str, before: Tensor, entries: Sequence[tuple[Lora, LoraPart]]) -> Tensor:
    """Return the weight of ``layer`` with every LoRA of ``entries`` in it."""
    dtype = "F32" if before.dtype in ("F32", "F64") else "F16"

    def read() -> Array:
        weight = as_float32(before)
        with np.errstate(over="ignore", invalid="ignore"):
            changes = [lora.weight * part.change(weight) for lora, part in entries]
            merged: Array = weight + sum(changes[1:], start=changes[0])
            merged = merged.astype(np.float32 if dtype == "F32" else np.float16, copy=False)
        if not np.isfinite(merged).all():
            names = " and ".join(lora.name for lora, _ in entries)
            raise RequestError(f"{layer} overflows with the LoRA {names}; choose a smaller weight.")
        return merged

    return Tensor(dtype, before.shape, read)
