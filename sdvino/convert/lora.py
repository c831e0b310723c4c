"""LoRAs merged into the weights of a model before it is exported.

W becomes W + weight * alpha / rank * up @ down (arXiv:2106.09685, section 4.1), in float32. Whether
a LoRA fits is decided from headers, before torch is imported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.convert.lora_file import Lora, LoraPart, Shape, listed, open_lora, parse_lora
from sdvino.convert.lora_names import COMPONENTS, spellings
from sdvino.convert.tensor_file import TensorFile
from sdvino.errors import RequestError

__all__ = [
    "Lora",
    "LoraPart",
    "MergeReport",
    "check_loras",
    "hints",
    "layer_shapes",
    "merge",
    "open_lora",
    "parse_lora",
]

# The width of the text that cross-attention reads tells the families apart.
_FAMILIES = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What became of LoRAs in one component."""

    #: Layers whose weights changed.
    layers: int = 0
    #: The name of a LoRA -> its tensors for this component that fit no layer.
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def check_loras(
    loras: Iterable[Lora], shapes: Mapping[str, Mapping[str, Shape]]
) -> tuple[str, ...]:
    """Hold ``loras`` against the model; return sentences about what of them fits nothing.

    shapes: component -> dotted name of a layer -> shape of its weight. Raises RequestError for a
    LoRA of another family: none of it fits, or a layer of the same name has another shape.
    """
    tables = {name: spellings(name, layers) for name, layers in shapes.items()}
    warnings = []
    for lora in loras:
        left_out = list(lora.unknown)
        matched = 0
        taken: set[tuple[str, str]] = set()
        for part in lora.parts:
            layer = tables.get(part.component, {}).get(part.spelling)
            if layer is None or (part.component, layer) in taken:
                left_out.extend(part.tensors)
                continue
            if not _fits(part, shapes[part.component][layer]):
                raise RequestError(
                    _other_family(lora, shapes, (part, layer, shapes[part.component][layer]))
                )
            taken.add((part.component, layer))
            matched += 1
        if not matched:
            raise RequestError(_other_family(lora, shapes, None))
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


def _fits(part: LoraPart, weight: Shape) -> bool:
    """Return whether ``part`` can change a layer; 1 x 1 convolutions and linear ones are alike."""
    delta = part.delta_shape
    if delta[:2] != weight[:2]:
        return False
    if delta[2:] != weight[2:] and not set(delta[2:] + weight[2:]) <= {1}:
        return False
    magnitude = part.magnitude_shape
    return magnitude is None or math.prod(magnitude) in (delta[0], delta[1])


def _other_family(
    lora: Lora,
    shapes: Mapping[str, Mapping[str, Shape]],
    misfit: tuple[LoraPart, str, Shape] | None,
) -> str:
    theirs = {p.delta_shape[1] for p in lora.parts if p.spelling.endswith("attn2_to_k")}
    ours = {
        shape[1] for name, shape in shapes.get("unet", {}).items() if name.endswith("attn2.to_k")
    }
    if theirs and ours and theirs != ours:
        return (
            f"The LoRA {lora.path} is for {_family(theirs)}, and this model is {_family(ours)};"
            " choose a LoRA for the same family."
        )
    if misfit is not None:
        part, layer, weight = misfit
        return (
            f"The LoRA {lora.path} is for another model: its {layer} is"
            f" {list(part.delta_shape)} and here it is {list(weight)}; choose one for this family."
        )
    names = [name for part in lora.parts for name in part.tensors]
    return (
        f"Nothing in the LoRA {lora.path} fits this model ({listed(names)});"
        " choose a LoRA for the same family."
    )


def _family(widths: Iterable[int]) -> str:
    width = max(widths)
    return _FAMILIES.get(width, f"a model with text {width} wide")


def layer_shapes(files: Mapping[str, Iterable[Path]]) -> dict[str, dict[str, Shape]]:
    """Return component -> layer -> shape of its weight, from the headers of safetensors.

    files: sub-folder of a diffusers folder -> its weights; those a LoRA cannot change are skipped.
    """
    found: dict[str, dict[str, Shape]] = {}
    for component in COMPONENTS:
        for path in files.get(component, ()):
            tensors = TensorFile.open(path, "the model").tensors
            layers = {name: info.shape for name, info in tensors.items()}
            found.setdefault(component, {}).update(weights_of(layers))
    return found


def weights_of(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return layer -> shape of its weight, of tensors by name: those that a LoRA can change."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }


def merge(
    module: Any,
    component: str,
    loras: Sequence[Lora],
    mapped: MutableMapping[str, NDArray[Any]] | None = None,
) -> MergeReport:
    """Add ``loras`` to the weights of the torch ``module``, which is ``component`` of a model.

    mapped: values of parameters that ``module`` has in name and shape alone; changed ones are
    replaced by new arrays. Every LoRA is worked out from the weights as they were, in float32, so
    their order is of no account; a weight keeps its own type. DoRA (arXiv:2402.09353) is applied
    in full at weight 1, and in part in between. Raises RequestError, before anything is changed,
    when a part does not fit, and when a result overflows.
    """
    import torch
    from safetensors import safe_open

    if component not in COMPONENTS or not loras:
        return MergeReport()
    mapped = {} if mapped is None else mapped
    parameters = dict(module.named_parameters())
    shapes = weights_of({name: tuple(value.shape) for name, value in parameters.items()})
    found, unmatched = _assign(component, shapes, loras)
    with contextlib.ExitStack() as stack, torch.no_grad():
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {lora.path for lora in loras}
        }
        for layer, entries in found.items():
            name = f"{layer}.weight"
            parameter = parameters[name]
            weight = _single(mapped[name] if name in mapped else parameter.detach())
            merged = weight + sum(
                _delta(files[lora.path], lora, part, weight) for lora, part in entries
            )
            if name not in mapped:
                merged = merged.to(parameter.dtype)
            if not bool(torch.isfinite(merged).all()):
                names = " and ".join(lora.name for lora, _ in entries)
                raise RequestError(
                    f"{layer} overflows with the LoRA {names}; choose a smaller weight."
                )
            if name in mapped:
                mapped[name] = _as_before(merged, mapped[name])
            else:  # a new tensor: the old one may be a view of the file on the disk
                parameter.data = merged
    return MergeReport(layers=len(found), unmatched=unmatched)


def _assign(
    component: str, shapes: Mapping[str, Shape], loras: Sequence[Lora]
) -> tuple[dict[str, list[tuple[Lora, LoraPart]]], dict[str, tuple[str, ...]]]:
    """Return layer -> what changes it, and the name of a LoRA -> its tensors that fit no layer."""
    table = spellings(component, shapes)
    found: dict[str, list[tuple[Lora, LoraPart]]] = {}
    unmatched: dict[str, tuple[str, ...]] = {}
    for lora in loras:
        taken: set[str] = set()
        left_out: list[str] = []
        for part in lora.parts:
            if part.component != component:
                continue
            layer = table.get(part.spelling)
            if layer is None or layer in taken:
                left_out.extend(part.tensors)
                continue
            if not _fits(part, shapes[layer]):
                misfit = (part, layer, shapes[layer])
                raise RequestError(_other_family(lora, {component: shapes}, misfit))
            taken.add(layer)
            if lora.weight:
                found.setdefault(layer, []).append((lora, part))
        if left_out:
            unmatched[lora.name] = tuple(left_out)
    return found, unmatched


def _single(value: Any) -> Any:
    """Return a tensor or an array as a tensor in float32."""
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.float32))
    return value.to(torch.float32)


def _as_before(merged: Any, before: NDArray[Any]) -> NDArray[Any]:
    """Return ``merged`` in the type of ``before``, or in float32 where that cannot hold it."""
    single: NDArray[np.float32] = merged.numpy()
    with np.errstate(over="ignore"):
        result = single.astype(before.dtype)
    return result if np.isfinite(result).all() else single


def _delta(file: Any, lora: Lora, part: LoraPart, weight: Any) -> Any:
    """Return what ``part`` adds to ``weight``, float32, in its shape."""
    import torch

    def read(name: str) -> Any:
        return file.get_tensor(name).to(torch.float32)

    down, up = read(part.down), read(part.up).flatten(1)
    if part.mid is None:
        product = up @ down.flatten(1)
    else:
        product = torch.einsum("or,rshw,si->oihw", up, read(part.mid), down.flatten(1))
    change = (part.scale * product).reshape(weight.shape)
    if part.magnitude is None:
        return lora.weight * change
    return lora.weight * (_with_magnitude(weight + change, read(part.magnitude)) - weight)


def _with_magnitude(direction: Any, magnitude: Any) -> Any:
    """Return ``direction`` with its vectors scaled to DoRA's lengths: a row's, or a column's.

    LyCORIS once learnt one length for each input, everyone else learns one for each output.
    """
    import torch

    rows = magnitude.numel() == direction.shape[0] and (
        magnitude.ndim == 1 or magnitude.shape[0] == direction.shape[0]
    )
    axis = 0 if rows else 1
    others = [i for i in range(direction.ndim) if i != axis]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    shape = [1] * direction.ndim
    shape[axis] = -1
    return direction * (magnitude.reshape(shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny))
