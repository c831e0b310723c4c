"""safetensors files beyond their headers: searched for NaN and renamed without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdvino.convert.safetensors_header import Header, TensorInfo, read_header
from sdvino.errors import RequestError

#: File names of weights that run code when they are opened.
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_MAX_TENSORS = 100_000
_CHUNK = 16 * 2**20
# Type of a float tensor -> the unsigned integers to read it as, and the bits of its exponent:
# all of them set means infinity or NaN (IEEE 754; bfloat16 is float32's upper half).
_FLOATS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_WHOLE: Mapping[str, str] = {"I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True, slots=True)
class TensorFile(Header):
    """A checked safetensors file, whose numbers are looked at."""

    @classmethod
    def open(cls, path: Path, what: str) -> TensorFile:
        """Read and check the header; ``what`` is what the file should be, such as "a LoRA".

        Raises RequestError when it is missing, a pickle, damaged (the header must account for
        every byte of the file), or empty.
        """
        if path.suffix.lower() in PICKLES:
            raise RequestError(
                f"{path} is a pickle, which can run code when it is opened;"
                f" get {what} as a .safetensors file."
            )
        if not path.exists():
            raise RequestError(f"{path} does not exist; give {what} as a .safetensors file.")
        header = read_header(path)
        if not header.tensors:
            raise RequestError(f"{path} is empty; download {what} again.")
        if len(header.tensors) > _MAX_TENSORS:
            count = len(header.tensors)
            raise RequestError(f"{path} holds {count} tensors, which {what} never does.")
        return cls(path=path, tensors=header.tensors, metadata=header.metadata)

    def check_finite(self, names: Container[str] | None = None) -> None:
        """Raise RequestError when one of the tensors ``names`` (all) holds NaN or infinity."""
        with self.path.open("rb") as file:
            for name, info in self.tensors.items():
                if names is None or name in names:
                    self._check_float(name, info)
                    if not _is_finite(file, info):
                        raise RequestError(
                            f"{self.path} holds numbers that are none (NaN or infinity, in"
                            f" {name[:120]}); download the file again or choose another."
                        )

    def scalar(self, name: str) -> float:
        """Return the one number that the tensor ``name`` holds; raises RequestError otherwise."""
        info = self.tensors[name]
        if info.dtype not in _WHOLE:
            self._check_float(name, info)
        if math.prod(info.shape) != 1:
            raise RequestError(f"{self.path} gives {name[:120]} as more than one number.")
        with self.path.open("rb") as file:
            file.seek(info.start)
            raw = file.read(info.end - info.start)
        if info.dtype == "BF16":
            raw = b"\0\0" + raw
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<f4", **_WHOLE}[info.dtype]
        return float(np.frombuffer(raw, dtype=kind)[0])

    def _check_float(self, name: str, info: TensorInfo) -> None:
        if info.dtype not in _FLOATS:
            raise RequestError(
                f"{self.path} holds {info.dtype} numbers in {name[:120]};"
                " convert takes float32, float16 and bfloat16 ones."
            )


@dataclass(frozen=True, slots=True)
class Renamed:
    """A tensor of a file, and what it is called and how it is shaped in another."""

    file: TensorFile
    old: str
    new: str
    shape: tuple[int, ...]


def write_renamed(tensors: Sequence[Renamed], output: Path) -> None:
    """Write ``tensors`` to the file ``output``; their bytes are copied as they are.

    The file appears when it is complete, and is left alone when it was made from the same before.
    """
    origin = ";".join(sorted({_identity(tensor.file.path) for tensor in tensors}))
    header: dict[str, object] = {"__metadata__": {"format": "pt", "origin": origin}}
    where = 0
    for tensor in tensors:
        info = tensor.file.tensors[tensor.old]
        end = where + info.end - info.start
        header[tensor.new] = {
            "dtype": info.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [where, end],
        }
        where = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    if _begins(output, text, len(text) + where):
        return
    part = output.with_name(f"{output.name}.part")
    with part.open("wb") as target:
        target.write(text)
        for tensor in tensors:
            info = tensor.file.tensors[tensor.old]
            with tensor.file.path.open("rb") as source:
                source.seek(info.start)
                _copy(source, target, info.end - info.start)
    part.replace(output)


def _identity(path: Path) -> str:
    told = path.stat()
    return f"{path.name},{told.st_size},{told.st_mtime_ns}"


def _begins(path: Path, text: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(text)) == text


def _is_finite(file: BinaryIO, info: TensorInfo) -> bool:
    kind, exponent = _FLOATS[info.dtype]
    file.seek(info.start, os.SEEK_SET)
    left = info.end - info.start
    while left:
        raw = file.read(min(left, _CHUNK))
        if not raw:
            return False  # cut while it was read
        left -= len(raw)
        bits = np.frombuffer(raw, dtype=kind)
        if bool(((bits & bits.dtype.type(exponent)) == exponent).any()):
            return False
    return True


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        raw = source.read(min(size, _CHUNK))
        if not raw:
            raise RequestError("A file became shorter while it was read; run the command again.")
        target.write(raw)
        size -= len(raw)
