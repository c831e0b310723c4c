from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sdvino.diffusion.torch_noise import TorchNoise, _fma
from sdvino.settings import MAX_SEED, MIN_SEED

SEEDS = [0, 1, -1, 42, 2**32 - 1, 2**32, 2**32 + 1, MAX_SEED, MIN_SEED]


def assert_same_bits(seed: int, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = TorchNoise(seed)
    for shape in shapes:
        theirs = torch.randn(shape, generator=generator).numpy()
        ours = noise.randn(shape)
        assert ours.dtype == np.float32
        assert ours.shape == shape
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_small_count_and_a_picture(seed: int) -> None:
    assert_same_bits(seed, [(n,) for n in range(1, 41)] + [(1, 4, 64, 64)])


@given(
    seed=st.integers(MIN_SEED, MAX_SEED),
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 40)),
            st.tuples(st.integers(1, 3), st.just(4), st.integers(1, 33), st.integers(1, 33)),
        ),
        min_size=1,
        max_size=6,
    ),
)
@example(seed=0, shapes=[(1,), (16,), (1,), (17,), (3,)])
@settings(deadline=None, max_examples=100)
def test_several_draws_in_a_row(seed: int, shapes: list[tuple[int, ...]]) -> None:
    assert_same_bits(seed, shapes)


def test_a_million_odd_numbers() -> None:
    assert_same_bits(20240229, [(1_000_003,), (7,), (1_000_003,)])


def test_nothing_asked_leaves_the_stream_alone() -> None:
    noise = TorchNoise(5)
    assert noise.randn((0, 4)).shape == (0, 4)
    np.testing.assert_array_equal(noise.randn((20,)), TorchNoise(5).randn((20,)))


def exact_fma(a: float, b: float, c: float) -> np.float32:
    """Round a * b + c to float32 once, by whole numbers."""
    from fractions import Fraction

    value = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(value))
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, -near)]
    # The nearest; of two as near, the one with an even last bit.
    return min(
        candidates,
        key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1),
    )


normal_float32 = st.floats(0.5, 2.0, width=32)


@given(a=normal_float32, b=normal_float32, c=normal_float32)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    assert fma_of(a, b, c) == exact_fma(a, b, c)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fused_multiply_add_where_float64_hides_the_side(sign: float) -> None:
    # a * b = 1 + 2**-24 lies halfway between two float32 numbers; c, too small for float64 to
    # keep beside it, says which is nearer.
    a, b = 1.0 + 2.0**-12, 1.0 - 2.0**-12 + 2.0**-23
    halfway = a * b
    c = 1.0 + 2.0**-24 - halfway + sign * 2.0**-60
    c32 = np.float32(c)
    assert fma_of(a, b, float(c32)) == exact_fma(a, b, float(c32))
    tiny = sign * 2.0**-60
    assert fma_of(1.0 + 2.0**-12, 1.0 + 2.0**-12, tiny) == exact_fma(
        1.0 + 2.0**-12, 1.0 + 2.0**-12, tiny
    )


def fma_of(a: float, b: float, c: float) -> np.float32:
    array: NDArray[np.float32] = np.array([a], np.float32)
    result: np.float32 = _fma(array, np.float32(b), np.float32(c))[0]
    return result
