from __future__ import annotations

import numpy as np
import pytest

from sdvino.diffusion.cuda_noise import CudaNoise, philox

# Random123's known answers for philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as AUTOMATIC1111 documents it.
CUDA_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(np.array(counter, np.uint64)[:, None], key)
    assert tuple(int(word) for word in words[:, 0]) == expected


def test_randn_gives_the_numbers_of_a_gpu() -> None:
    noise = CudaNoise(0).randn((3, 4))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, CUDA_SEED_0, atol=1e-5)


def test_the_numbers_do_not_depend_on_the_count_drawn() -> None:
    # One thread a number: the first twelve are the same in a large draw.
    many = CudaNoise(0).randn((1, 4, 64, 64))
    np.testing.assert_allclose(many.reshape(-1)[:12], np.ravel(CUDA_SEED_0), atol=1e-5)


def test_a_draw_moves_every_thread_on_by_one_counter() -> None:
    noise = CudaNoise(11)
    first, second = noise.randn((300,)), noise.randn((300,))
    assert not np.any(first == second)
    counter = np.zeros((4, 1), np.uint64)
    counter[0], counter[2] = 1, 299  # the second draw, thread 299
    x, y = (float(word) for word in philox(counter, (11, 0))[:2, 0])
    u, v = (x + 0.5) * 2.0**-32, (y + 0.5) * 2.0**-32
    expected = np.sqrt(-2.0 * np.log(u)) * np.sin(2.0 * np.pi * v)
    assert second[299] == pytest.approx(expected, abs=1e-5)


def test_a_small_card_gives_each_thread_four_numbers_a_turn() -> None:
    wide = CudaNoise(3).randn((256,))
    narrow = CudaNoise(3, threads=256).randn((2100,))
    # The first number of each thread comes first, then the second of each, ...
    np.testing.assert_array_equal(narrow[:256], wide)
    # ... and after four of each, the next counter: what a second draw begins with.
    noise = CudaNoise(3, threads=256)
    noise.randn((1,))
    np.testing.assert_array_equal(narrow[1024:1280], noise.randn((256,)))
    # 2,100 numbers are three turns of 1,024.
    after = CudaNoise(3, threads=256)
    after.randn((2100,))
    again = CudaNoise(3)
    for _ in range(3):
        again.randn((256,))
    np.testing.assert_array_equal(after.randn((256,)), again.randn((256,)))


def test_negative_and_large_seeds_use_all_64_bits() -> None:
    draws = [CudaNoise(seed).randn((8,)) for seed in (-1, 2**63 - 1, 2**32 - 1, -(2**63))]
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert not np.array_equal(one, other)


def test_it_is_standard_normal() -> None:
    noise = CudaNoise(123).randn((100_000,))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1.0) < 0.02
    assert CudaNoise(1).randn((0,)).shape == (0,)
