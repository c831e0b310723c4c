"""A component's weights as safetensors: read and written one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sdvino.errors import RequestError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Dtype = Literal["float16", "float32"]

_ITEM_BYTES = {"F16": 2, "F32": 4}
_HALF_MAX = 65504.0


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of one variant in ``folder``: the plain one, or else fp16's."""
    files = sorted(folder.glob("*.safetensors"))
    usable = [file for file in files if "non_ema" not in file.name]
    plain = [file for file in usable if ".fp16" not in file.name]
    chosen = plain if plain else usable
    if not chosen:
        raise RequestError(f"{folder} holds no .safetensors weights; give the folder complete.")
    return chosen


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor, from checked headers; raises RequestError."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    path = None
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"{path} is damaged or not a safetensors file ({error}); get it again."
        ) from error
    return shapes


def fill(module: Any, files: Sequence[Path]) -> None:
    """Give ``module``, perhaps on the meta device, the tensors of ``files``, in float32.

    Names and shapes must be those of the module. Raises RequestError for weights that are not
    numbers.
    """
    import torch
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    # A copy: what is mapped from the file must not be written to.
                    tensor = tensor.to(torch.float32, copy=True)
                    if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                        raise RequestError(
                            f"{path} has weights that are not numbers ({name[:120]}); get it again."
                        )
                _assign(module, name, tensor)


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

    The file appears when it is complete. Source: the format section of the safetensors README.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, tensor in tensors.items():
        kind = _kind(tensor, dtype)
        end = place + _ITEM_BYTES[kind] * tensor.numel()
        table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            wide = "<f2" if table[name]["dtype"] == "F16" else "<f4"
            array = tensor.detach().cpu().float().numpy()
            file.write(array.astype(wide, order="C").tobytes())
    part.replace(path)


def _kind(tensor: Any, dtype: Dtype) -> str:
    if not tensor.is_floating_point():
        raise RequestError(f"A tensor of {tensor.dtype} cannot be kept; convert a plain model.")
    if dtype == "float32" or not tensor.numel():
        return "F32"
    largest = float(tensor.abs().max())
    return "F16" if math.isfinite(largest) and largest <= _HALF_MAX else "F32"
