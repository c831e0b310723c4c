"""torch's CUDA normal noise without a GPU: Philox4x32-10 and Box-Muller, to 1e-5.

The seeds that AUTOMATIC1111 calls "GPU" give these numbers. cuRAND's own logarithm and sine differ
from NumPy's in the last bits, hence no bit-exactness.

Sources: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox); cuRAND's
``curand_normal4``; ATen/native/cuda/DistributionTemplates.h of PyTorch 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_THREADS_PER_BLOCK = 256
_VALUES_PER_THREAD = 4


class CudaNoise:
    """The stream of ``torch.Generator("cuda").manual_seed(seed)``, continuing from draw to draw.

    torch spreads a draw over the threads of the card, four numbers a thread and turn. As long as
    the draw has no more elements than the card has resident threads, each thread's first number
    is used, and the card does not matter; that is assumed unless ``threads`` says otherwise
    (multiprocessors x threads of each: 43,008 on an RTX 3060; a 512 x 512 picture draws 16,384).
    """

    def __init__(self, seed: int, *, threads: int | None = None) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._threads = threads
        self._offset = 0

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return standard normal float32 numbers as ``torch.randn(shape, device="cuda")``."""
        size = math.prod(shape)
        if size == 0:
            return np.empty(tuple(shape), np.float32)
        threads = -(-size // _THREADS_PER_BLOCK) * _THREADS_PER_BLOCK
        if self._threads is not None:
            threads = min(threads, self._threads)
        turns = -(-size // (threads * _VALUES_PER_THREAD))
        values = np.concatenate([self._turn(self._offset + i, threads) for i in range(turns)])
        self._offset += turns
        return values[:size].reshape(tuple(shape))

    def _turn(self, offset: int, threads: int) -> NDArray[np.float32]:
        """Return what all threads draw in one turn: first numbers, second numbers, and so on."""
        counter = np.zeros((4, threads), np.uint64)
        counter[0] = offset & 0xFFFFFFFF
        counter[1] = offset >> 32
        counter[2] = np.arange(threads)
        x, y, z, w = philox(counter, self._key)
        return np.concatenate([*_box_muller(x, y), *_box_muller(z, w)])


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Return Philox4x32-10 of each column of ``counter``.

    Args:
        counter: uint64 [4, n] of 32-bit words.
        key: two 32-bit words.

    Returns:
        uint64 [4, n] of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p2 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p2 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _box_muller(
    x: NDArray[np.uint64], y: NDArray[np.uint64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Turn two rows of 32-bit words into two rows of normals, the sine first, as cuRAND does."""
    u = _uniform(x)
    v = _uniform(y) * np.float32(2.0 * math.pi)
    radius = np.sqrt(np.float32(-2.0) * np.log(u))
    return radius * np.sin(v), radius * np.cos(v)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return numbers in (0, 1]: the middle of each of the 2**32 cells."""
    scale = np.float32(2.0**-32)
    uniform: NDArray[np.float32] = words.astype(np.float32) * scale + scale / np.float32(2.0)
    return uniform
