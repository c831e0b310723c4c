"""A model's weights in single precision on disk, where running it in float needs less memory.

OpenVINO's CPU plugin widens half-precision weights into a copy of its own and packs that into a
second one: 6.9 GB for 860 million weights. Weights that stand in a mapped file in single precision
are packed straight from it, and the file's pages go back to the system as soon as they were read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

# Bytes: the plugin takes weights as they are when they are aligned, and copies them otherwise.
_ALIGNMENT = 64
# Elements: smaller weights are left alone.
_SMALL = 4096
_GIVE_BACK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Weight:
    """A half-precision constant, the conversion behind it, and its place in the file."""

    constant: Any
    convert: Any
    offset: int
    count: int


@contextlib.contextmanager
def weights_on_disk(model: ov.Model, file: Path) -> Iterator[None]:
    """Move the half-precision weights of ``model`` to ``file``, in float32, while the block runs.

    ``file`` takes four bytes a weight and is removed afterwards, on Windows by whoever removes its
    folder: the mapping lasts as long as a model that uses it. The numbers are exactly the same.
    """
    weights = list(_half_weights(model))
    if not weights:
        yield
        return
    mapped = _write(file, weights)
    for weight in weights:
        part = mapped[weight.offset : weight.offset + 4 * weight.count].view(np.float32)
        shape = list(weight.constant.get_output_shape(0))
        wide = ov.op.Constant(part.reshape(shape), shared_memory=True)
        wide.set_friendly_name(weight.convert.get_friendly_name())
        for port in weight.convert.output(0).get_target_inputs():
            port.replace_source_output(wide.output(0))
    done = threading.Event()
    thread = threading.Thread(target=_give_back, args=(mapped, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):  # Windows does not remove what is mapped
            file.unlink()


def _half_weights(model: ov.Model) -> Iterator[_Weight]:
    offset = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Convert" or op.get_output_element_type(0) != ov.Type.f32:
            continue
        constant = op.input_value(0).get_node()
        count = math.prod(constant.get_output_shape(0)) if _is_half(constant) else 0
        if count >= _SMALL:
            yield _Weight(constant, op, offset, count)
            offset += -(-4 * count // _ALIGNMENT) * _ALIGNMENT


def _is_half(node: ov.Node) -> bool:
    half = node.get_output_element_type(0) == ov.Type.f16
    return bool(half and node.get_type_name() == "Constant")


def _write(file: Path, weights: list[_Weight]) -> Any:
    """Write the weights, one after the other, and return the file as mapped bytes."""
    with file.open("wb") as out:
        for weight in weights:
            out.seek(weight.offset)
            out.write(np.asarray(weight.constant.data, dtype=np.float32).tobytes())
    # Copy on write: OpenVINO takes only arrays that could be written to. Nobody does.
    return np.memmap(file, dtype=np.uint8, mode="c")


def _give_back(mapped: Any, done: threading.Event) -> None:
    """Tell the system again and again that it may take the file's pages: they can be read anew."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    while not done.wait(_GIVE_BACK_SECONDS):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
