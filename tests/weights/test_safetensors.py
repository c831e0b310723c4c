"""Headers believed or refused, numbers mapped, and files written."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sdvino.errors import RequestError
from sdvino.weights.numbers import of_array
from sdvino.weights.safetensors import DTYPES, TensorFile, open_tensors, write_tensors
from tests.convert.mini_checkpoint import write_header


def test_the_header_tells_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"a": values, "b": np.ones(4, np.float16)}, path, {"format": "pt"})
    file = TensorFile.open(path)
    tensor = file.tensors["a"]
    assert (tensor.dtype, tensor.shape, tensor.size, tensor.bytes) == ("F32", (2, 3), 6, 24)
    assert file.metadata == {"format": "pt"}
    assert open_tensors([path]) == file.tensors
    np.testing.assert_array_equal(tensor.read(), values)


def test_numbers_are_mapped_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones((256, 256), np.float16)}, path)
    array = open_tensors([path])["a"].read()
    assert type(array) is np.ndarray
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    assert array.flags.writeable
    array[:] = 2
    np.testing.assert_array_equal(load_file(path)["a"], 1)


def test_two_files_are_one_component(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file({file.stem: np.ones(2, np.float32)}, file)
    assert set(open_tensors(files)) == {"a", "b"}
    with pytest.raises(RequestError, match="another file of the component"):
        open_tensors([files[0], files[0]])


@pytest.mark.parametrize("change", ["gone", "cut", "newer"])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(9, np.float32)}, path)
    tensor = open_tensors([path])["a"]
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(RequestError, match="missing" if change == "gone" else "changed while"):
        tensor.read()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays: dict[str, Any] = {}
    for kind in DTYPES:
        raw = np.random.default_rng(0).integers(0, 2, 48, dtype=np.uint8)
        arrays[kind] = raw.view(DTYPES[kind])
        arrays[f"{kind} matrix"] = raw.view(DTYPES[kind]).reshape(2, -1).T
    arrays |= {"F32 empty": np.zeros((0, 3), "<f4"), "F16 scalar": np.array(2, "<f2")}
    tensors = {name: of_array(array, name.partition(" ")[0]) for name, array in arrays.items()}
    write_tensors(path, tensors, {"note": "hello"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    file = TensorFile.open(path)
    assert file.tensors == tensors
    assert file.metadata == {"format": "pt", "note": "hello"}
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


def test_data_that_lies_between_whole_numbers_of_bytes_is_copied(tmp_path: Path) -> None:
    table = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"x" + np.array([1, 2], "<f4").tobytes()
    array = open_tensors([write_header(tmp_path / "a.safetensors", table, data)])["b"].read()
    assert array.flags.aligned
    assert array.tolist() == [1, 2]


def one(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4], **changes}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[1]", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        (b'{"w": 1}', b""),
        (b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":1}', b"\0\0"),
        (one(), b"\0\0\0"),
        (one(), b"\0" * 5),
        (one(shape=[3]), b"\0" * 4),
        (one(shape=[-2]), b"\0" * 4),
        (one(shape=[2**62, 2**62]), b"\0" * 4),
        (one(shape=[2.0]), b"\0" * 4),
        (one(shape=[True, 2]), b"\0" * 4),
        (one(shape=[1] * 9 + [2]), b"\0" * 4),
        (one(dtype="F12"), b"\0" * 4),
        (one(dtype=None), b"\0" * 4),
        (one(data_offsets=[0]), b"\0" * 4),
        (one(data_offsets=[4, 0]), b"\0" * 4),
        (one(data_offsets=[2, 6]), b"\0" * 6),
        ({**one(), "v": one()["w"]}, b"\0" * 4),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    file = write_header(tmp_path / "a.safetensors", header, data)
    with pytest.raises(RequestError, match="damaged") as caught:
        TensorFile.open(file)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), b"\x80\x04." * 9])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        TensorFile.open(file)
    with pytest.raises(RequestError, match="missing"):
        TensorFile.open(tmp_path / "none.safetensors")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200), prefix=st.booleans())
def test_anything_at_all_is_read_or_refused(tmp_path: Path, content: bytes, prefix: bool) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content if prefix else content)
    with contextlib.suppress(RequestError):
        TensorFile.open(file)
