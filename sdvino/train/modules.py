"""A component that is no longer what its config.json describes, on the disk and in memory.

Its folder holds config.json, safetensors, and `structure.json`: what to do to the module that the
config describes, so that the weights fit it. That file was written by somebody else: its names
must exist, its counts be possible, and every shape must agree with the safetensors header before
a weight is read. Without it a folder is a plain one of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.inputs.files import read_json, write_json
from sdvino.nets.structure import STRUCTURE_FILE, Structure, within, wrong
from sdvino.weights.layouts.diffusers import component_tensors, weight_files
from sdvino.weights.numbers import FLOATS, as_float32, check_finite, of_array
from sdvino.weights.safetensors import Tensor, Tensors, write_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Dtype = Literal["float16", "float32"]

_HALF_MAX = 65504.0


def apply(structure: Structure, module: Any) -> None:
    """Make of ``module``, as its config describes it, one that the weights fit, in place.

    Best on torch's meta device, where it costs nothing. Raises RequestError for names that do
    not exist and counts that cannot be.
    """
    from sdvino.train import lean_modules as lean

    for name in structure.removed:
        lean.put(module, name, _gap(_find(module, name), name))
    for name, count in structure.heads.items():
        attention = _find(module, name)
        heads = getattr(attention, "heads", 0) if _is(attention, "Attention") else 0
        lean.keep_heads(attention, range(within(name, count, heads)))
    for name, count in structure.channels.items():
        block = _find(module, name)
        width = block.net[2].in_features if _is(block, "FeedForward") else 0
        lean.keep_channels(block, range(within(name, count, width)))
    for name, rank in structure.ranks.items():
        layer = _find(module, name)
        most = min(layer.weight.shape[0], layer.weight[0].numel()) if _dense(layer) else 0
        lean.put(module, name, lean.low_rank_like(layer, within(name, rank, most)))


def build(component: str, config: Mapping[str, Any], structure: Structure) -> Any:
    """Return the torch module on the meta device: names and shapes, no weights."""
    import torch

    with torch.device("meta"):
        module = _from_config(component, config)
        apply(structure, module)
    return module.eval().requires_grad_(False)


def load_component(folder: Path, component: str) -> Any:
    """Return the module in ``folder``, float32 and eval mode; nothing in the folder is run.

    ``component``: unet, vae, text_encoder or text_encoder_2. Raises RequestError for a structure
    that does not fit the config, and weights that fit neither.
    """
    config = read_json(folder / "config.json", f"{folder.name}/config.json")
    tensors = component_tensors(component, weight_files(folder))
    return load_module(component, config, tensors, Structure.read(folder))


def load_module(
    component: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    structure: Structure | None = None,
) -> Any:
    """Return the module that ``config`` and ``structure`` describe, with ``tensors``, as above."""
    module = build(component, config, Structure() if structure is None else structure)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        described = "config.json" if structure is None else STRUCTURE_FILE
        differing = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise RequestError(
            f"The weights of the {component} do not fit its {described} ({differing[0][:120]});"
            " get the model again, complete."
        )
    if any(buffer.is_meta for buffer in module.buffers()):
        # Buffers that are in no file, such as a text encoder's positions, are made by the class.
        module = _with_buffers(component, config, module)
    fill(module, tensors)
    return module


def save_component(
    module: Any,
    folder: Path,
    *,
    config: Mapping[str, Any],
    structure: Structure,
    dtype: Dtype = "float16",
) -> None:
    """Write what `load_component` reads into ``folder``, one tensor in memory at a time.

    ``config`` is the component's own, of diffusers. A tensor that half precision cannot hold stays
    in float32.
    """
    write_json(folder / "config.json", dict(config))
    structure.write(folder)
    write_weights(folder / WEIGHTS_FILE, module.state_dict(), dtype)


def _from_config(component: str, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    values = {key: value for key, value in config.items() if key != "_name_or_path"}
    if component == "unet":
        return diffusers.UNet2DConditionModel.from_config(values)
    if component == "vae":
        return diffusers.AutoencoderKL.from_config(values)
    two = component == "text_encoder_2"
    cls = transformers.CLIPTextModelWithProjection if two else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**values))


def _with_buffers(component: str, config: Mapping[str, Any], module: Any) -> Any:
    """Give ``module`` the buffers of one made in full; only text encoders have any."""
    short = {**config, "num_hidden_layers": 1}  # its buffers are the embeddings'
    full = dict(_from_config(component, short).named_buffers())
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, own = name.rpartition(".")
            module.get_submodule(parent)._buffers[own] = full[name]
    return module


def _gap(module: Any, name: str) -> Any:
    if _is(module, "Transformer2DModel") or (_is(module, "ResnetBlock2D") and can_pass(module)):
        return gap_for(module)
    raise wrong(f"removes {name[:120]!r}, which cannot be left out")


def gap_for(block: Any) -> Any:
    """Return what stands where ``block``, a residual or an attention block, was."""
    from sdvino.train.lean_modules import NoAttention, PassThrough

    return NoAttention() if _is(block, "Transformer2DModel") else PassThrough(block.out_channels)


def can_pass(resnet: Any) -> bool:
    """Tell whether what a ResnetBlock2D is fed could go on in its place, as it is."""
    plain = resnet.upsample is None and resnet.downsample is None
    return bool(plain and resnet.in_channels >= resnet.out_channels)


def _find(module: Any, name: str) -> Any:
    try:
        return module.get_submodule(name) if name else None
    except AttributeError as error:
        raise wrong(f"names {name[:120]!r}, which this component has not") from error


def _is(module: Any, name: str) -> bool:
    return type(module).__name__ == name


def _dense(module: Any) -> bool:
    from sdvino.train.lean_modules import can_be_low_rank

    return module is not None and can_be_low_rank(module)


def fill(module: Any, tensors: Tensors) -> None:
    """Give ``module``, perhaps on the meta device, the ``tensors``, floats in float32.

    Names and shapes must be those of the module. Raises RequestError for weights that are not
    numbers.
    """
    import torch

    for name, tensor in tensors.items():
        # A copy: what is mapped from the file must not be written to.
        if tensor.dtype in FLOATS:
            values = np.array(as_float32(tensor))
            check_finite({name: of_array(values, "F32")}, "The source")
        else:
            values = np.array(tensor.read())
        _assign(module, name, torch.from_numpy(values))


def _assign(module: Any, name: str, tensor: Any) -> None:
    import torch

    parent, _, own = name.rpartition(".")
    owner = module.get_submodule(parent)
    if own in owner._parameters:
        owner._parameters[own] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[own] = tensor


def write_weights(
    path: Path,
    tensors: Mapping[str, Any],
    dtype: Dtype,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write ``tensors``, torch's, as the safetensors file ``path``, floats in ``dtype``.

    The file appears when it is complete.
    """
    kept = {
        name: Tensor(_kind(tensor, dtype), tuple(tensor.shape), partial(_array, tensor))
        for name, tensor in tensors.items()
    }
    write_tensors(path, kept, metadata)


def _array(tensor: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return array


def _kind(tensor: Any, dtype: Dtype) -> str:
    if not tensor.is_floating_point():
        raise RequestError(f"A tensor of {tensor.dtype} cannot be kept; convert a plain model.")
    if dtype == "float32" or not tensor.numel():
        return "F32"
    largest = float(tensor.abs().max())
    return "F16" if math.isfinite(largest) and largest <= _HALF_MAX else "F32"
