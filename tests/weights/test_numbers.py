"""Every float type against torch's, and what is none found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdvino.errors import RequestError
from sdvino.weights.numbers import (
    as_float32,
    as_half,
    check_finite,
    check_floats,
    first_not_finite,
    is_finite,
    of_array,
    reshaped,
    rows,
    transposed,
)
from sdvino.weights.safetensors import DTYPES, Tensor

#: Type -> torch's, and the integers that hold it.
KINDS: dict[str, tuple[Any, Any]] = {
    "F64": (torch.float64, None),
    "F32": (torch.float32, None),
    "F16": (torch.float16, None),
    "BF16": (torch.bfloat16, torch.uint16),
    "F8_E4M3": (torch.float8_e4m3fn, torch.uint8),
    "F8_E5M2": (torch.float8_e5m2, torch.uint8),
}


def tensor_of(values: Any, dtype: str) -> Tensor:
    bits = KINDS[dtype][1]
    return of_array((values if bits is None else values.view(bits)).numpy(), dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_number_there_is(dtype: str) -> None:
    width = np.dtype(DTYPES[dtype]).itemsize
    bits = torch.arange(256**width, dtype=torch.int32).to((torch.uint8, torch.uint16)[width - 1])
    values = bits.view(KINDS[dtype][0])
    tensor = tensor_of(values, dtype)
    np.testing.assert_array_equal(as_float32(tensor), values.float().numpy())
    half = values.float().to(torch.float16).numpy()
    np.testing.assert_array_equal(as_half(tensor), half)
    finite = torch.isfinite(values.float())
    assert is_finite(tensor_of(values[finite], dtype))
    for one in values[~finite]:
        assert not is_finite(tensor_of(one.reshape(1), dtype))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
@pytest.mark.parametrize("place", [0, 299_999, 555_555, 599_999])
def test_one_among_many_that_is_no_number(dtype: str, value: float | None, place: int) -> None:
    if dtype == "F8_E4M3" and value is not None:
        value = np.nan
    values = torch.randn(600, 1000).clamp(-3, 3)
    if value is not None:
        values.view(-1)[place] = value
    tensor = tensor_of(values.to(KINDS[dtype][0]), dtype)
    assert is_finite(tensor) == is_finite(transposed(tensor)) == (value is None)
    tensors = {"fine": of_array(np.ones(3, np.float16), "F16"), "it": tensor}
    assert first_not_finite(tensors) == (None if value is None else "it")


def test_largest_and_empty_are_numbers() -> None:
    assert is_finite(of_array(np.array([np.finfo(np.float32).max], np.float32), "F32"))
    assert is_finite(of_array(np.zeros((0, 4), np.float16), "F16"))
    assert is_finite(of_array(np.array(-7), "I64"))


def test_what_is_no_number_gets_a_sentence() -> None:
    tensors = {"w": of_array(np.array([1, np.nan], np.float32), "F32")}
    with pytest.raises(RequestError, match=r"^The unet holds weights that are not numbers .* in w"):
        check_finite(tensors, "The unet")
    with pytest.raises(RequestError, match="is stored as I8"):
        check_floats({"w": of_array(np.ones(2, np.int8), "I8")}, "The unet")


def test_too_large_for_half_precision_becomes_infinity() -> None:
    values = of_array(np.array([65_504, 70_000, -1e30], np.float32), "F32")
    assert as_half(values).tolist() == [65_504, np.inf, -np.inf]


def test_other_views_are_made_when_they_are_read() -> None:
    array = np.arange(12, dtype=np.float16).reshape(6, 2)
    reads = []

    def read() -> Any:
        reads.append(1)
        return array

    tensor = Tensor("F16", (6, 2), read)
    views = [rows(tensor, 2, 4), reshaped(tensor, (6, 2, 1, 1)), transposed(tensor)]
    assert [view.shape for view in views] == [(2, 2), (6, 2, 1, 1), (2, 6)]
    assert not reads
    assert [view.read().shape for view in views] == [view.shape for view in views]
    assert np.shares_memory(views[0].read(), array)
    assert np.shares_memory(views[1].read(), array)
    np.testing.assert_array_equal(views[0].read(), array[2:4])
    assert views[2].read().flags.c_contiguous
    np.testing.assert_array_equal(views[2].read(), array.T)
