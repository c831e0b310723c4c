"""The numbers of tensors: other views of them, other types, and whether they are numbers at all.

What is made of a tensor is a tensor again: nothing is read before it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.weights.safetensors import Shape, Tensor, Tensors

Array: TypeAlias = NDArray[Any]

# Type of a float tensor -> the unsigned integers that hold it, and the bits that, all set, mean
# infinity or NaN: its exponent (IEEE 754; bfloat16 is the upper half of a float32, F8_E5M2 of a
# float16). F8_E4M3 has no infinity and one NaN of either sign (arXiv:2209.05433).
_NOT_FINITE: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F64": ("<u8", 0x7FF0_0000_0000_0000),
        "F32": ("<u4", 0x7F80_0000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F8_E5M2": ("u1", 0x7C),
        "F8_E4M3": ("u1", 0x7F),
    }
)
#: Types of floating-point numbers.
FLOATS: tuple[str, ...] = tuple(_NOT_FINITE)
# Elements looked at together: they stay in a core's cache.
_CHUNK = 2**17


def reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    """Return ``tensor`` in another shape of the same size, as a 1 x 1 convolution is linear."""
    return Tensor(tensor.dtype, shape, lambda: tensor.read().reshape(shape))


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return the rows from ``start`` to ``stop``, without it."""
    shape = (stop - start, *tensor.shape[1:])
    return Tensor(tensor.dtype, shape, lambda: tensor.read()[start:stop])


def transposed(tensor: Tensor) -> Tensor:
    """Return the matrix ``tensor`` with rows for columns, a copy when it is read."""
    return Tensor(tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T))


def of_array(array: Array, dtype: str) -> Tensor:
    """Return ``array``, of NumPy's type for ``dtype``, as a tensor."""
    return Tensor(dtype, array.shape, lambda: array)


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """Return the numbers of ``tensor``, of any type, in single precision: a copy, but for F32."""
    array = tensor.read()
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif tensor.dtype == "F8_E5M2":
        array = (array.astype(np.uint16) << np.uint16(8)).view(np.float16)
    elif tensor.dtype == "F8_E4M3":
        array = _E4M3[array]
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def as_half(tensor: Tensor) -> NDArray[np.float16]:
    """Return the numbers of ``tensor`` in half precision: a copy, but for F16.

    Those over 65,504, the largest there is, become infinity.
    """
    array = tensor.read() if tensor.dtype == "F16" else as_float32(tensor)
    with np.errstate(over="ignore"):
        return array.astype(np.float16, copy=False)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element of ``tensor`` is NaN or infinity; takes no memory to speak of."""
    if tensor.dtype not in _NOT_FINITE:
        return True
    kind, mask = _NOT_FINITE[tensor.dtype]
    bits = tensor.read().ravel(order="K").view(kind)
    spread = bits.dtype.type(mask)
    return all(
        int((bits[start : start + _CHUNK] & spread).max()) != mask
        for start in range(0, bits.size, _CHUNK)
    )


def first_not_finite(tensors: Tensors) -> str | None:
    """Return the name of a tensor that holds NaN or infinity, None without one."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def relative_error(result: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the norm of the difference over the norm of ``reference``; shapes must agree.

    0 where both are zero; infinity where only the reference is, or where a value is no number.
    """
    if result.shape != reference.shape:
        raise ValueError(f"Cannot compare shapes {result.shape} and {reference.shape}.")
    wanted = np.asarray(reference, np.float64)
    above = float(np.linalg.norm(np.asarray(result, np.float64) - wanted))
    below = float(np.linalg.norm(wanted))
    if not math.isfinite(above):
        return math.inf
    if below == 0.0:
        return 0.0 if above == 0.0 else math.inf
    return above / below


def mean_relative_error(
    results: Iterable[NDArray[Any]], references: Iterable[NDArray[Any]]
) -> float:
    """Return the root mean square of `relative_error` over pairs."""
    errors = [relative_error(*pair) for pair in zip(results, references, strict=True)]
    return math.sqrt(float(np.mean(np.square(errors))))


def check_finite(tensors: Tensors, what: object) -> None:
    """Raise RequestError unless every weight of ``tensors`` is a number; ``what`` holds them."""
    name = first_not_finite(tensors)
    if name is not None:
        raise RequestError(
            f"{what} holds weights that are not numbers (NaN or infinity, in {name[:120]});"
            " get it again or choose another version."
        )


def check_floats(tensors: Tensors, what: object) -> None:
    """Raise RequestError unless every tensor is of floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise RequestError(
                f"{what} is stored as {tensor.dtype} ({name[:120]}), which is no type of"
                " floating-point numbers; give the fp16 version."
            )


def _e4m3_table() -> NDArray[np.float32]:
    """Return the 256 numbers of F8_E4M3: 4 bits of exponent, bias 7, and 3 of mantissa."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    size[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3_table()
