from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdvino.compress.weight_coding import Coding, describe, encode, squared_error

EIGHT = Coding(bits=8, granularity="channel", symmetric=True)
CODINGS = [
    Coding(bits=8, granularity="tensor", symmetric=True),
    EIGHT,
    Coding(bits=8, granularity="channel"),
    Coding(bits=8, granularity="group", group_size=16),
    Coding(bits=4, granularity="channel"),
    Coding(bits=4, granularity="group", group_size=16, symmetric=True),
    Coding(bits=4, granularity="group", group_size=16),
]


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_no_weight_is_further_off_than_half_a_step(coding: Coding, data: st.DataObject) -> None:
    values = st.floats(-100, 100, width=32, allow_subnormal=False)
    matrix = data.draw(arrays(np.float32, (4, 32), elements=values))
    found = encode(matrix, coding)
    blocks = coding.blocks(*matrix.shape)
    steps = np.broadcast_to(found.scale.astype(np.float32), (blocks, matrix.size // blocks))
    # An asymmetric range moves by half a step at most, for a zero point that is whole.
    allowed = (0.5 if coding.symmetric else 1.0) * steps.reshape(matrix.shape)
    assert (np.abs(found.decode(matrix.shape) - matrix) <= 1.002 * allowed + 1e-6).all()


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_bytes_are_those_of_what_is_stored(coding: Coding) -> None:
    found = encode(normal(8, 64), coding)
    stored = found.levels.size * coding.bits // 8 + found.scale.nbytes
    if found.zero is not None:
        stored += found.zero.size * coding.bits // 8
    assert coding.bytes(8, 64) == stored


def test_zero_stays_zero() -> None:
    matrix = normal(4, 32)
    matrix[:, ::3] = 0
    for coding in CODINGS:
        assert (encode(matrix, coding).decode(matrix.shape)[:, ::3] == 0).all()
    assert squared_error(np.zeros((2, 16), np.float32), EIGHT) == 0


def test_smaller_blocks_and_more_bits_lose_less() -> None:
    matrix = normal(16, 256) * np.geomspace(0.1, 10, 16, dtype=np.float32)[:, None]
    errors = [
        squared_error(matrix, coding)
        for coding in (
            Coding(bits=4, granularity="channel"),
            Coding(bits=4, granularity="group", group_size=128),
            Coding(bits=4, granularity="group", group_size=32),
            Coding(bits=8, granularity="tensor", symmetric=True),
            EIGHT,
        )
    ]
    assert errors == sorted(errors, reverse=True)


def test_clipping_pays_where_tails_are_heavy() -> None:
    matrix = normal(4, 4096)
    matrix[:, 7] = 30.0
    kinds = {
        name: squared_error(matrix, Coding(bits=4, granularity="channel", estimator=name))
        for name in ("min-max", "percentile", "mse")
    }
    # What is clipped here is itself most of the squares of the error: the search sees that.
    assert kinds["mse"] < kinds["min-max"]
    gaussian = normal(4, 4096)
    for estimator in ("min-max", "mse"):
        coding = Coding(bits=4, granularity="channel", estimator=estimator)
        kinds[estimator] = squared_error(gaussian, coding)
    assert kinds["mse"] < 0.8 * kinds["min-max"]


def test_distributions_are_told_apart() -> None:
    flat, tails = normal(8, 1024), normal(8, 1024) ** 3
    assert describe(flat).kurtosis == pytest.approx(0, abs=0.3)
    assert describe(flat).outliers < 1e-3
    assert describe(tails).kurtosis > 10
    assert describe(tails).outliers > describe(flat).outliers
    flat[3] *= 50
    assert describe(flat).spread > 20
    assert describe(np.ones((2, 2), np.float32)).spread == 1


def test_large_and_tiny_weights_stay_finite() -> None:
    for size in (1e-7, 6e4):
        matrix = size * normal(4, 32).clip(-1, 1)
        for coding in CODINGS:
            assert np.isfinite(encode(matrix, coding).decode(matrix.shape)).all()
