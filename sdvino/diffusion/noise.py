"""Noise by name: the random streams that people's seeds stand for.

``torch`` gives diffusers' and ComfyUI's pictures for a seed, ``cuda`` AUTOMATIC1111's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.cuda_noise import CudaNoise
from sdvino.diffusion.torch_noise import TorchNoise
from sdvino.errors import RequestError
from sdvino.settings import MAX_SEED, MIN_SEED, NOISES, NoiseName

__all__ = ["CudaNoise", "NoiseSource", "TorchNoise", "make_noise"]


class NoiseSource(Protocol):
    """A stream of standard normal numbers, continuing from draw to draw."""

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return standard normal float32 numbers of ``shape``."""
        ...


def make_noise(name: NoiseName, seed: int) -> NoiseSource:
    """Return the noise stream ``name``, seeded.

    Args:
        name: ``torch`` or ``cuda``.
        seed: from -2**63 to 2**63 - 1, as torch takes it. ``torch`` uses its low 32 bits only.

    Raises:
        RequestError: an unknown name, or a seed that is no whole number in that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise RequestError(f"The seed is {seed!r}; give a whole number.")
    if not MIN_SEED <= seed <= MAX_SEED:
        raise RequestError(f"The seed is {seed}; give a whole number from -2**63 to 2**63 - 1.")
    if name == "torch":
        return TorchNoise(int(seed))
    if name == "cuda":
        return CudaNoise(int(seed))
    raise RequestError(f"Unknown noise {name!r}; choose one of: {', '.join(NOISES)}.")


def given_noise(
    latents: NDArray[np.float32] | None, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """Return the noise given to a call, float32 of ``shape``; raises RequestError."""
    if latents is None:
        return None
    given = np.asarray(latents, np.float32)
    if given.shape != shape:
        raise RequestError(
            f"The latents have the shape {list(given.shape)}; this request takes {list(shape)}."
        )
    if not np.isfinite(given).all():
        raise RequestError("The latents hold NaN or infinity; give finite noise.")
    return given
