"""The header of a safetensors file, read and checked without loading a weight.

It says the name, type, shape and place of every tensor, which is all that telling a model's family
takes. The header was written by somebody else: sizes and places that contradict each other or the
file's length are refused here, before memory is taken.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.inputs.files import open_file
from sdvino.inputs.plain import NotPlain, parse_json

# The limit of the safetensors library; Stable Diffusion XL's header has 0.3 MB.
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_RANK = 8
_MAX_NAME = 1_000
_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
#: Types that `read_half` turns into half precision.
FLOATS: tuple[str, ...] = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, as the header has it."""

    #: As safetensors spells it: F16, BF16, F32 ...
    dtype: str
    shape: tuple[int, ...]
    #: Bytes from and to, counted from the start of the file.
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the file ``path`` says it holds, checked against its length."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    #: Free text of whoever wrote the file.
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``; raises RequestError, in one sentence."""
    with open_file(path, error=RequestError, remedy="download it again") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "it is cut off, or no safetensors file at all")
        raw = file.read(length)
    try:
        entries = parse_json(raw)
    except NotPlain as error:
        raise _damaged(path, f"its header is not what safetensors writes ({error})") from error
    return check_header(path, entries, 8 + length, size)


def check_header(path: Path, entries: object, data: int, size: int | None) -> Header:
    """Return the header of ``path``, of which ``entries`` is the JSON, checked.

    ``data`` is where the weights begin, in bytes; ``size`` is the file's, None where it is not
    here. Raises RequestError.
    """
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not what safetensors writes")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict):
        metadata = {}
    tensors = {
        name: _tensor(path, name, entry, data)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    _check_places(path, tensors, data, size)
    return Header(
        path=path,
        tensors=tensors,
        metadata={str(key): value for key, value in metadata.items() if isinstance(value, str)},
    )


def read_half(header: Header, name: str) -> NDArray[np.float16]:
    """Return a float tensor in half precision.

    Raises RequestError when it holds values that are not numbers, or none that half precision has
    (65,504 is the largest), which no weight of a working model is.
    """
    info = header.tensors[name]
    raw = np.memmap(header.path, np.uint8, "r", offset=info.start, shape=(info.end - info.start,))
    if info.dtype == "BF16":  # the upper half of a float32
        wide = raw.view("<u2").astype(np.uint32) << np.uint32(16)
        values: NDArray[Any] = wide.view(np.float32)
    else:
        values = raw.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[info.dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise RequestError(
            f"{header.path} holds weights that are not numbers, or absurdly large, in {name[:120]};"
            " the file is broken, so get it again or choose another version of the model."
        )
    return half.reshape(info.shape)


def _tensor(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    if not isinstance(entry, dict) or len(name) > _MAX_NAME:
        raise _damaged(path, "its header is not what safetensors writes")
    dtype, shape, places = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _damaged(path, f"{name[:80]} is of an unknown type ({str(dtype)[:20]})")
    if not _is_counts(shape) or len(shape) > _MAX_RANK or not _is_counts(places):
        raise _damaged(path, f"its header gives {name[:80]} an impossible shape or place")
    if len(places) != 2 or places[1] - places[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _damaged(path, f"its header lies about the size of {name[:80]}")
    return TensorInfo(dtype, tuple(shape), data + places[0], data + places[1])


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= 2**48 for item in value
    )


def _check_places(
    path: Path, tensors: Mapping[str, TensorInfo], data: int, size: int | None
) -> None:
    """Check that the tensors lie one after the other and end where the file does."""
    end = data
    for start, stop in sorted((info.start, info.end) for info in tensors.values()):
        if start != end:
            raise _damaged(path, "its header lies about where the weights are")
        end = stop
    size = end if size is None else size
    if end > size:
        raise _damaged(path, f"it is cut off: {size:,} of {end:,} bytes are there")
    if end < size:
        raise _damaged(path, f"it has {size - end:,} bytes that its header does not name")


def write_half(path: Path, tensors: Mapping[str, tuple[int, ...]], values: Iterable[Any]) -> None:
    """Write the safetensors file ``path`` in half precision, one tensor in memory at a time.

    ``values`` gives the float16 arrays in the order of ``tensors``, names to shapes. The file
    appears when it is complete.
    """
    part = path.with_name(path.name + ".part")
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors.items():
        end = place + 2 * math.prod(shape)
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in values:
            file.write(np.ascontiguousarray(array, dtype="<f2").data)
    part.replace(path)


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged or not a safetensors file: {what}; download it again.")
