"""Weights that stay in their file: mapped into memory, and handed to OpenVINO as they are.

torch traces a model by running it, in float32, but the graph does not depend on the weights. So
each parameter is one element, seen as a tensor of the right shape, while the model is traced, and
the file's own half-precision numbers take its place in OpenVINO's graph. A UNet of 860 million
weights is traced with a few megabytes of them, where a copy in float32 takes 3.4 GB.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import SdvinoError

Array = NDArray[Any]

_NUMPY_TYPES: Mapping[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# Tensors below this many elements are real ones: norms and biases, which save nothing, and whose
# values tracing may read.
_SMALL_ELEMENTS = 4_096
_HALF_MAX = float(np.finfo(np.float16).max)


def map_safetensors(files: Iterable[Path]) -> dict[str, Array]:
    """Return the tensors in ``files`` by name, mapped, not read; bfloat16 as float32 copies.

    The files are checked ones: header and size agree. Source: the safetensors format.
    """
    tensors: dict[str, Array] = {}
    for file in files:
        # Copy on write: OpenVINO takes only arrays that could be written to. Nobody does.
        raw = np.memmap(file, dtype=np.uint8, mode="c")
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:start].tobytes())
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                tensors[name] = _typed(raw[begin:end], entry["dtype"], entry["shape"])
    return tensors


def _typed(raw: Array, kind: str, shape: list[int]) -> Array:
    typed: Array
    if kind == "BF16":
        typed = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        typed = raw.view(np.dtype(_NUMPY_TYPES.get(kind, np.uint8)).newbyteorder("<"))
    return typed.reshape(shape) if kind in _NUMPY_TYPES or kind == "BF16" else typed


def first_not_finite(tensors: Mapping[str, Array]) -> str | None:
    """Return the name of a tensor that holds NaN or infinity: its sum does, and takes no memory."""
    for name, array in tensors.items():
        if not np.isfinite(array.sum(dtype=np.float64)):
            return name
    return None


def place(module: Any, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Give ``module``, built on torch's meta device, its weights, the large ones only seemingly.

    Those are returned: they belong in the graph. Names and shapes must be those of the module.
    """
    import torch

    state: dict[str, Any] = {}
    mapped: dict[str, Array] = {}
    one = torch.zeros(1, dtype=torch.float32)
    for name, array in tensors.items():
        if array.size < _SMALL_ELEMENTS:
            state[name] = torch.from_numpy(array.astype(np.float32))
        else:
            state[name] = one.expand(array.shape)
            mapped[name] = array
    module.load_state_dict(state, assign=True)
    return mapped


def detach(module: Any, besides: Mapping[str, Array]) -> dict[str, Array]:
    """Take the weights out of ``module``, one after the other, and leave their shapes.

    Those in ``besides`` were never in it. Returned, with them, is what `weights_in_graph` takes:
    half precision where that holds them.
    """
    import torch

    one = torch.zeros(1, dtype=torch.float32)
    taken: dict[str, Array] = dict(besides)
    for name, parameter in module.named_parameters():
        if name in taken:
            continue
        if parameter.numel() >= _SMALL_ELEMENTS and parameter.is_floating_point():
            taken[name] = _halved(parameter.detach().to(torch.float32).numpy())
            parameter.data = one.expand(parameter.shape)
    return taken


@contextlib.contextmanager
def weights_in_graph(tensors: Mapping[str, Array]) -> Iterator[None]:
    """Let OpenVINO's frontend take ``tensors`` for the parameters of these names.

    What wraps the module while it is traced may put more before the names. Float16 stays float16,
    behind a conversion to float32; a wider tensor is rounded to it where its values fit.
    Raises SdvinoError for a parameter without values that is not in ``tensors``.
    """
    from openvino.frontend.pytorch import ts_decoder

    decoder = ts_decoder.TorchScriptPythonDecoder
    decode = decoder.try_decode_get_attr

    def try_decode_get_attr(self: Any) -> Any:
        value, name = ts_decoder.get_value_from_getattr(self.graph_element, self.pt_module)
        array = _find(tensors, name)
        if array is not None and name not in self.constant_cache:
            dtype = self.get_type_for_value(value)
            self._add_name_to_const_and_cache(_constant(array, name), name, dtype)
        elif array is None and _is_placeholder(value):
            raise SdvinoError(f"The weight {name} was lost while the model was traced.")
        return decode(self)

    decoder.try_decode_get_attr = try_decode_get_attr
    try:
        yield
    finally:
        decoder.try_decode_get_attr = decode


def _find(tensors: Mapping[str, Array], name: str) -> Array | None:
    """Return the tensor whose name is the longest end of ``name``."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((tensors[end] for end in ends if end in tensors), None)


def _is_placeholder(value: Any) -> bool:
    """Tell whether ``value`` is a tensor that only seems to be one; see `place`."""
    strides = getattr(value, "stride", None)
    if strides is None or value.numel() < _SMALL_ELEMENTS:
        return False
    return not any(strides())


def _constant(array: Array, name: str) -> list[ov.Output]:
    """Return ``array`` as float32 in the graph; underneath it is in half precision if it fits."""
    array = np.ascontiguousarray(_halved(array))
    if array.dtype != np.float16:
        return list(ops.constant(array).outputs())
    constant = ov.op.Constant(array, shared_memory=True)
    constant.set_friendly_name(f"{name}_compressed")  # as OpenVINO's own compression names it
    return list(ops.convert(constant, "f32").outputs())


def _halved(array: Array) -> Array:
    """Return ``array`` as float16, or as float32 when a value is too large for that."""
    if array.dtype == np.float16:
        return array
    largest = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
    return array.astype(np.float16 if largest <= _HALF_MAX else np.float32)
