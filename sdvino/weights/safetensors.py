"""safetensors files: the header read and checked, the numbers mapped on demand, and written.

A header says the name, type, shape and place of every tensor, which is all that telling a model's
family takes. It was written by somebody else: sizes and places that contradict each other or the
file's length are refused here, before memory is taken.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.inputs.files import open_file
from sdvino.inputs.plain import NotPlain, parse_json

#: Endings of weights that run code when they are opened.
PICKLES: tuple[str, ...] = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
#: Type of numbers, as safetensors spells it -> NumPy's. What NumPy lacks is seen as its bits.
DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "U16": "<u2",
        "I16": "<i2",
        "F16": "<f2",
        "BF16": "<u2",
        "U32": "<u4",
        "I32": "<i4",
        "F32": "<f4",
        "U64": "<u8",
        "I64": "<i8",
        "F64": "<f8",
    }
)
# The limit of the safetensors library; Stable Diffusion XL's header has 0.3 MB.
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_TENSORS = 100_000
_MAX_RANK = 8
_MAX_NAME = 1_000


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint: known by its header, its numbers mapped on demand.

    Two are equal when their headers are.
    """

    #: As safetensors spells it: F32, F16, BF16, F8_E4M3, F8_E5M2, F64 ...
    dtype: str
    shape: tuple[int, ...]
    #: Returns the array, mapped where possible, in NumPy's type by `DTYPES`: bfloat16 and float8
    #: as their bits. Writing to it changes no file. Raises RequestError when the file is gone.
    read: Callable[[], NDArray[Any]] = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the bytes that its numbers take."""
        return self.size * _item_bytes(self.dtype)


#: Tensors by name; in diffusers' and transformers' naming once a layout has been applied.
Tensors: TypeAlias = Mapping[str, Tensor]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What the file ``path`` says it holds, checked against its length."""

    path: Path
    tensors: Tensors
    #: Free text of whoever wrote the file.
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, what: str | None = None) -> TensorFile:
        """Read and check the header of ``path``; no weight is read.

        ``what`` is what the file should be, such as "a LoRA" (None: a part of a model). Raises
        RequestError, in one sentence, when it is missing, a pickle, damaged or empty.
        """
        if what is not None:
            _check_given(path, what)
        with open_file(path, error=RequestError, remedy="download it again") as file:
            told = os.fstat(file.fileno())
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, told.st_size - 8):
                raise _damaged(path, "it is cut off, or no safetensors file at all")
            raw = file.read(length)
        try:
            entries = parse_json(raw)
        except NotPlain as error:
            raise _damaged(path, f"its header is not what safetensors writes ({error})") from error
        found = cls.of_header(path, entries, 8 + length, told.st_size, told.st_mtime_ns)
        if what is not None and not found.tensors:
            raise RequestError(f"{path} is empty; download {what} again.")
        return found

    @classmethod
    def of_header(
        cls, path: Path, entries: object, data: int, size: int | None, modified: int | None = None
    ) -> TensorFile:
        """Check ``entries``, the JSON of the header of ``path``; raises RequestError.

        ``data`` is where the weights begin, in bytes; ``size`` is the file's, and ``modified`` its
        time, None where it is not here.
        """
        if not isinstance(entries, dict) or len(entries) > _MAX_TENSORS:
            raise _damaged(path, "its header is not what safetensors writes")
        metadata = entries.get("__metadata__", {})
        places = {
            name: _Place.of(path, name, entry, data)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        _check_places(path, places.values(), data, size)
        tensors = {
            name: Tensor(place.dtype, place.shape, partial(_map, path, place, size, modified))
            for name, place in places.items()
        }
        words = metadata.items() if isinstance(metadata, dict) else ()
        return cls(path, tensors, {str(k): text for k, text in words if isinstance(text, str)})


def open_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors in ``files``, which are one component's; raises RequestError.

    The headers are checked, and nothing else is read.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        tensors = TensorFile.open(path).tensors
        twice = found.keys() & tensors.keys()
        if twice:
            raise RequestError(
                f"{path} holds {min(twice)[:120]}, which another file of the component holds too;"
                " download the model again."
            )
        found |= tensors
    return found


def write_tensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write ``tensors`` as the file ``path``, in their own types, one in memory at a time.

    The file appears when it is complete.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.bytes
        shape = list(tensor.shape)
        table[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read(), dtype=DTYPES[tensor.dtype])
            file.write(array.reshape(-1).view(np.uint8).data)
    part.replace(path)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor is: bytes from and to, counted from the start of the file."""

    dtype: str
    shape: Shape
    start: int
    end: int

    @classmethod
    def of(cls, path: Path, name: str, entry: object, data: int) -> _Place:
        if not isinstance(entry, dict) or len(name) > _MAX_NAME:
            raise _damaged(path, "its header is not what safetensors writes")
        dtype, shape, places = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _damaged(path, f"{name[:80]} is of an unknown type ({str(dtype)[:20]})")
        if not _is_counts(shape) or len(shape) > _MAX_RANK or not _is_counts(places):
            raise _damaged(path, f"its header gives {name[:80]} an impossible shape or place")
        if len(places) != 2 or places[1] - places[0] != math.prod(shape) * _item_bytes(dtype):
            raise _damaged(path, f"its header lies about the size of {name[:80]}")
        return cls(dtype, tuple(shape), data + places[0], data + places[1])


def _map(path: Path, place: _Place, size: int | None, modified: int | None) -> NDArray[Any]:
    """Return the array at ``place``, mapped copy-on-write: OpenVINO takes only what is writable."""
    kind = np.dtype(DTYPES[place.dtype])
    with open_file(path, error=RequestError, remedy="download it again") as file:
        told = os.fstat(file.fileno())
        if (told.st_size, told.st_mtime_ns) != (size, modified):
            raise RequestError(f"{path} changed while it was read; run the command again.")
        if place.start == place.end:
            return np.empty(place.shape, kind)
        length = (place.end - place.start) // kind.itemsize
        mapped = np.memmap(file, kind, "c", offset=place.start, shape=(length,))
    array = mapped.view(np.ndarray)
    return (array if array.flags.aligned else array.copy()).reshape(place.shape)


def _item_bytes(dtype: str) -> int:
    return np.dtype(DTYPES[dtype]).itemsize


def _check_given(path: Path, what: str) -> None:
    if path.suffix.lower() in PICKLES:
        raise RequestError(
            f"{path} is a pickle, which can run code when it is opened;"
            f" get {what} as a .safetensors file."
        )
    if not path.exists():
        raise RequestError(f"{path} does not exist; give {what} as a .safetensors file.")


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= 2**48 for item in value
    )


def _check_places(path: Path, places: Iterable[_Place], data: int, size: int | None) -> None:
    """Check that the tensors lie one after the other and end where the file does."""
    end = data
    for start, stop in sorted((place.start, place.end) for place in places):
        if start != end:
            raise _damaged(path, "its header lies about where the weights are")
        end = stop
    size = end if size is None else size
    if end > size:
        raise _damaged(path, f"it is cut off: {size:,} of {end:,} bytes are there")
    if end < size:
        raise _damaged(path, f"it has {size - end:,} bytes that its header does not name")


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged or not a safetensors file: {what}; download it again.")
