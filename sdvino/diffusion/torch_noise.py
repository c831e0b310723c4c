"""torch's CPU normal noise without torch, bit for bit.

``torch.randn`` on the CPU takes one of two ways, by the number of elements drawn:

- 16 or more: 24-bit uniforms in float32 and the Box-Muller transform on blocks of 16, with the
  polynomial logarithm, sine and cosine of Cephes (S. Moshier) that torch's AVX2 kernel uses. Its
  compiler fuses multiplications with the additions after them, which shows in the last bit, so
  ``_fma`` does the same here. (A torch forced to ATEN_CPU_CAPABILITY=default gives other bits.)
- fewer: 53-bit uniforms and Box-Muller in float64, one number at a time; every second number is
  kept for the next such draw.

Source: ATen/native/cpu/DistributionTemplates.h and ATen/core/DistributionsHelper.h of PyTorch 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_BLOCK = 16
_SQRT_HALF = np.float32(0.707106781186547524)
# ln 2 and pi/4 in pieces whose products with small whole numbers are exact (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MINUS_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


class TorchNoise:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``, continuing from draw to draw.

    Only the low 32 bits of ``seed`` count, as in torch.
    """

    def __init__(self, seed: int) -> None:
        # RandomState's seeding by one number is MT19937's own, which torch uses; its stream is
        # frozen by NumPy's compatibility policy.
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)
        self._next_normal: float | None = None

    def randn(self, shape: Sequence[int]) -> Float32:
        """Return standard normal float32 numbers, as ``torch.randn(shape, generator=...)``."""
        size = math.prod(shape)
        values = self._blocks(size) if size >= _BLOCK else self._scalars(size)
        return values.reshape(tuple(shape))

    def _blocks(self, size: int) -> Float32:
        whole = size - size % _BLOCK
        uniform = self._uniform(size)
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # torch draws the last 16 anew, over what stood there
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _uniform(self, size: int) -> Float32:
        """Return ``size`` numbers in [0, 1) with 24 random bits each."""
        bits = self._words(size) & np.uint32(0xFFFFFF)
        uniform: Float32 = bits.astype(np.float32) * np.float32(2.0**-24)
        return uniform

    def _scalars(self, size: int) -> Float32:
        return np.array([self._scalar() for _ in range(size)], np.float32)

    def _scalar(self) -> float:
        if self._next_normal is not None:
            value, self._next_normal = self._next_normal, None
            return value
        u1, u2 = self._uniform53(), self._uniform53()
        radius = math.sqrt(-2.0 * math.log1p(-u2))
        theta = 2.0 * math.pi * u1
        self._next_normal = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform53(self) -> float:
        """Return one number in [0, 1) with 53 random bits."""
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._generator.randint(0, 2**32, size=count, dtype=np.uint32)


def _box_muller(uniform: Float32) -> Float32:
    """Turn uniforms (a multiple of 16 of them) into normals, in torch's blocks of 8 + 8."""
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * _log(np.float32(1.0) - pairs[:, 0]))
    sin, cos = _sincos(np.float32(2.0 * math.pi) * pairs[:, 1])
    # Adding zero turns -0 into +0, as torch's multiplication by the deviation does.
    normal: Float32 = np.stack([radius * cos, radius * sin], axis=1) + np.float32(0.0)
    return normal.reshape(-1)


def _log(x: Float32) -> Float32:
    """Return the natural logarithm of ``x`` in (0, 1]."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    e = exponent.astype(np.float32) - low.astype(np.float32)
    x = np.where(low, mantissa + mantissa, mantissa) - np.float32(1.0)
    z = x * x
    y = _fma(_polynomial(x, _LOG) * x, z, e * _LN2_LOW)
    y = y - np.float32(0.5) * z
    return _fma(e, _LN2_HIGH, x + y)


def _sincos(x: Float32) -> tuple[Float32, Float32]:
    """Return the sine and cosine of ``x`` in [0, 2 pi)."""
    octant = (x * np.float32(4.0 / math.pi)).astype(np.int32)
    octant = (octant + 1) & ~1
    j = octant.astype(np.float32)
    for part in _MINUS_QUARTER_PI:
        x = _fma(j, np.float32(part), x)
    z = x * x
    cos = _fma(_polynomial(z, _COS) * z, z, np.float32(-0.5) * z) + np.float32(1.0)
    sin = _fma(_polynomial(z, _SIN) * z, x, x)
    swap = octant & 2 != 0
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    sin = np.where(octant & 4 != 0, -sin, sin)
    cos = np.where((octant + 2) & 4 != 0, -cos, cos)
    return sin, cos


def _polynomial(x: Float32, coefficients: Sequence[float]) -> Float32:
    """Evaluate by Horner's rule, every step one fused multiply-add; the highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, np.float32(coefficient))
    return y


def _fma(a: Float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """Return a * b + c in float32, rounded once.

    The product is exact in float64 and the sum nearly: only where the sum lies halfway between
    two float32 numbers can its own rounding have hidden which side the true value is on.
    """
    product = a.astype(np.float64) * b
    total = product + c
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if halfway.any():
        # The rounding error of the sum, exactly (Knuth's TwoSum), says which side.
        rest = total - product
        error = (product - (total - rest)) + (c - rest)
        away = np.nextafter(total, np.copysign(np.inf, error))
        total = np.where(halfway & (error != 0.0), away, total)
    return total.astype(np.float32)
