from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from sdvino.compress.similarity import WINDOW, psnr, ssim
from sdvino.weights.numbers import relative_error

Levels = NDArray[np.uint8]
PICTURES = arrays(np.uint8, (13, 14, 3))


def ramp(shape: tuple[int, ...] = (32, 40)) -> Levels:
    values = np.random.default_rng(0).integers(0, 256, shape)
    return np.asarray(ndimage.gaussian_filter(values.astype(np.float64), 1.0), np.uint8)


@given(PICTURES, PICTURES)
@settings(max_examples=30, deadline=None)
def test_both_are_symmetric_and_bounded(one: Levels, other: Levels) -> None:
    assert psnr(one, other) == psnr(other, one)
    assert ssim(one, other) == pytest.approx(ssim(other, one))
    assert -1.0 <= ssim(one, other) <= 1.0


@given(PICTURES)
@settings(max_examples=20, deadline=None)
def test_equal_pictures_are_perfect(picture: Levels) -> None:
    assert psnr(picture, picture.copy()) == math.inf
    assert ssim(picture, picture.copy()) == pytest.approx(1.0)


def test_psnr_of_a_known_difference() -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    assert psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)
    assert psnr(black, black + 255) == 0.0


@pytest.mark.parametrize(("a", "b"), [(100, 100), (100, 120), (0, 255), (10, 200)])
def test_ssim_of_flat_pictures_is_the_luminance_term(a: int, b: int) -> None:
    one, other = (np.full((20, 20), value, np.uint8) for value in (a, b))
    c1 = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_one_window_follows_the_paper_s_formula() -> None:
    rng = np.random.default_rng(3)
    one, other = (rng.integers(0, 256, (WINDOW, WINDOW)).astype(np.uint8) for _ in range(2))
    y, x = np.mgrid[-5:6, -5:6]
    w = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    w /= w.sum()
    a, b = one.astype(float), other.astype(float)
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
    cov = (w * (a - ma) * (b - mb)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(one, other) == pytest.approx(expected)


def test_ssim_agrees_with_filtering_by_scipy() -> None:
    one = ramp()
    noise = np.random.default_rng(1).normal(0, 8, one.shape)
    other = np.clip(one + noise, 0, 255).astype(np.uint8)

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        blurred = ndimage.gaussian_filter(values, 1.5, truncate=5 / 1.5)
        return np.asarray(blurred[5:-5, 5:-5], np.float64)

    a, b = one.astype(np.float64), other.astype(np.float64)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(one, other) == pytest.approx(float(expected.mean()), abs=1e-9)
    assert 0.3 < ssim(one, other) < 0.99


def test_more_noise_is_less_alike() -> None:
    one = ramp((48, 48, 3))
    rng = np.random.default_rng(2)
    noisy = [
        np.clip(one + rng.normal(0, s, one.shape), 0, 255).astype(np.uint8) for s in (2, 8, 32)
    ]
    for measure in (psnr, ssim):
        values = [measure(one, other) for other in noisy]
        assert values == sorted(values, reverse=True)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        psnr(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="11"):
        ssim(np.zeros((10, 30), np.uint8), np.zeros((10, 30), np.uint8))


def test_relative_error() -> None:
    ones = np.ones(4, np.float32)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones * 0, ones * 0) == 0.0
    assert relative_error(ones, ones * 0) == math.inf
    assert relative_error(ones * np.nan, ones) == math.inf
