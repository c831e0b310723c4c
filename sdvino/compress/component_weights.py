"""A component's weights in torch modules: read and written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.weights.numbers import FLOATS, as_float32, check_finite, of_array
from sdvino.weights.safetensors import Tensor, Tensors, open_tensors, write_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Dtype = Literal["float16", "float32"]

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
    return {name: tensor.shape for name, tensor in open_tensors(files).items()}


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
