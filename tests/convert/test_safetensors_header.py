from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sdvino.convert.safetensors_header import read_half, read_header, write_half
from sdvino.errors import RequestError
from tests.convert.mini_checkpoint import write_header


def test_the_header_tells_what_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"a": values, "b": np.ones(4, np.float16)}, file, {"format": "pt"})
    header = read_header(file)
    assert header.tensors["a"].shape == (2, 3)
    assert header.tensors["a"].dtype == "F32"
    assert header.metadata == {"format": "pt"}
    np.testing.assert_array_equal(read_half(header, "a"), values.astype(np.float16))


def test_bfloat16_becomes_half_precision(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 0.15625, 3e-3], np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2")
    entry = {"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    header = read_header(write_header(tmp_path / "a.safetensors", entry, raw.tobytes()))
    np.testing.assert_allclose(read_half(header, "w"), values, rtol=2**-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_what_is_no_weight_is_refused(tmp_path: Path, value: float) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": np.array([0, value, 1], np.float32)}, file)
    with pytest.raises(RequestError, match="not numbers"):
        read_half(read_header(file), "w")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        n: rng.standard_normal(s).astype(np.float16) for n, s in (("a", (3, 5)), ("b", (7,)))
    }
    file = tmp_path / "a.safetensors"
    write_half(file, {n: t.shape for n, t in tensors.items()}, iter(tensors.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    read_header(file)
    for name, tensor in load_file(file).items():
        np.testing.assert_array_equal(tensor, tensors[name])


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
        read_header(file)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), b"\x80\x04." * 9])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        read_header(file)
    with pytest.raises(RequestError, match="missing"):
        read_header(tmp_path / "none.safetensors")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200), prefix=st.booleans())
def test_anything_at_all_is_read_or_refused(tmp_path: Path, content: bytes, prefix: bool) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content if prefix else content)
    with contextlib.suppress(RequestError):
        read_header(file)
