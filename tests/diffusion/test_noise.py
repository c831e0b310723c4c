from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdvino.diffusion.noise import BatchNoise, CudaNoise, TorchNoise, make_noise
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


def test_a_batch_is_the_pictures_one_by_one_as_in_diffusers() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8, 9)]
    noise = BatchNoise([make_noise("torch", seed) for seed in (7, 8, 9)])
    for shape in ((3, 4, 5, 7), (3, 4, 8, 8)):
        theirs = randn_tensor(shape, generator=generators).numpy()
        np.testing.assert_array_equal(noise.randn(shape), theirs)


def test_a_batch_of_another_size_is_refused() -> None:
    noise = BatchNoise([make_noise("torch", 0)])
    with pytest.raises(RequestError, match="one seed for each picture"):
        noise.randn((2, 4, 8, 8))
    with pytest.raises(RequestError, match="at least one"):
        BatchNoise([])
