from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdvino.diffusion.noise import CudaNoise, TorchNoise, make_noise
from sdvino.errors import RequestError
from sdvino.settings import MAX_SEED, MIN_SEED


def test_names() -> None:
    assert isinstance(make_noise("torch", 0), TorchNoise)
    assert isinstance(make_noise("cuda", 0), CudaNoise)
    unknown: Any = "mps"
    with pytest.raises(RequestError, match="choose one of: torch, cuda"):
        make_noise(unknown, 0)


@pytest.mark.parametrize("seed", [MAX_SEED, MIN_SEED, np.int64(3)])
def test_seeds_that_torch_takes(seed: int) -> None:
    assert make_noise("torch", seed).randn((4,)).shape == (4,)


@pytest.mark.parametrize("seed", [MAX_SEED + 1, MIN_SEED - 1, 1.0, "7", True, None])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(RequestError, match="give a whole number"):
        make_noise("torch", seed)
