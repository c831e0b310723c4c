from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.graph.vae import decoder_to_float
from sdvino.image.autoencoder import VaeDecoder
from sdvino.image.tiling import OVERLAP, TILE, tile_shape, tiled_decode, to_levels
from tests.graph.exported import SCALING, Compiled, read, some_latents, tiny_decoder


def enlarge(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """A decoder without a neighbourhood: tiles must then make exactly the whole."""
    channels = np.moveaxis(latents[:, :3], 1, -1)
    return channels.repeat(2, axis=1).repeat(2, axis=2)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), height=st.integers(1, 70), width=st.integers(1, 70))
def test_tiles_cover_every_size_once(data: st.DataObject, height: int, width: int) -> None:
    tile = data.draw(st.integers(2, 24))
    overlap = data.draw(st.integers(0, tile // 2))
    latents = some_latents(1, 4, height, width)
    shapes = set()

    def decode_tile(part: NDArray[np.float32]) -> NDArray[np.float32]:
        shapes.add(part.shape)
        assert part.flags.c_contiguous
        return enlarge(part)

    picture = tiled_decode(decode_tile, latents, tile=tile, overlap=overlap)
    np.testing.assert_allclose(picture, enlarge(latents), atol=1e-5)
    assert shapes == {(1, 4, *tile_shape(height, width, tile=tile, overlap=overlap))}


def smooth_latents(height: int, width: int) -> NDArray[np.float32]:
    """Latents as a denoised picture has them: broad shapes with a little texture."""
    coarse = some_latents(1, 4, height // 8 + 2, width // 8 + 2, seed=4)
    y, x = np.arange(height) / 8, np.arange(width) / 8
    iy, ix = y.astype(int), x.astype(int)
    fy, fx = (y - iy)[:, None], (x - ix)[None, :]
    corner = [coarse[:, :, iy + a][:, :, :, ix + b] for a in (0, 1) for b in (0, 1)]
    top, bottom = corner[0] * (1 - fx) + corner[1] * fx, corner[2] * (1 - fx) + corner[3] * fx
    texture = 0.05 * some_latents(1, 4, height, width, seed=5)
    return np.asarray(top * (1 - fy) + bottom * fy + texture, np.float32)


def psnr(picture: NDArray[np.float32], whole: NDArray[np.float32]) -> float:
    """Peak signal to noise in dB, the peak being what ``whole`` really spans."""
    return float(20 * np.log10(np.ptp(whole)) - 10 * np.log10(np.mean((picture - whole) ** 2)))


def steps(picture: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Mean absolute step from each row (axis 1) or column (axis 2) of pixels to the next."""
    across: NDArray[np.float32] = np.abs(np.diff(picture, axis=axis))
    return np.asarray(across.mean(axis=tuple({0, 1, 2, 3} - {axis})), np.float32)


@pytest.mark.parametrize("size", [(48, 48), (37, 51), (24, 70)])
def test_a_convolutional_decoder_leaves_no_seams(size: tuple[int, int]) -> None:
    model = tiny_decoder()
    decoder_to_float(model, 1.0)
    component = Compiled(model)
    decoder = VaeDecoder(component)
    latents = smooth_latents(*size)
    whole = decoder.decode_float(latents)
    tiled = decoder.decode_tiled(latents, tile=24, overlap=8)
    assert component.calls > 3
    assert psnr(tiled, whole) > 45.0
    for axis in (1, 2):
        # What tiling changes is less, between any two rows, than they ordinarily differ by.
        assert steps(tiled - whole, axis).max() < steps(whole, axis).mean()


def test_cutting_instead_of_blending_would_fail_that() -> None:
    model = tiny_decoder()
    decoder_to_float(model, 1.0)
    decoder = VaeDecoder(Compiled(model))
    latents = smooth_latents(48, 48)
    whole = decoder.decode_float(latents)
    cut = decoder.decode_tiled(latents, tile=24, overlap=0)
    assert psnr(cut, whole) < 45.0
    assert steps(cut - whole, 1).argmax() in range(24 * 8 - 3, 24 * 8 + 2)
    assert steps(cut - whole, 1).max() > steps(whole, 1).mean()


def test_group_norms_make_tiles_differ_and_blending_hides_it() -> None:
    model = read("vae_decoder")
    decoder_to_float(model, SCALING)
    decoder = VaeDecoder(Compiled(model))
    latents = smooth_latents(48, 48)
    whole = decoder.decode_float(latents)
    tiled = decoder.decode_tiled(latents, tile=24, overlap=8)
    cut = decoder.decode_tiled(latents, tile=24, overlap=0)
    # Untrained, so nothing taught it to be steady under the statistics of a part.
    assert psnr(tiled, whole) > psnr(cut, whole) + 1.0
    borders = [8 * border for border in (12, 24, 36)]
    for axis in (1, 2):
        assert steps(tiled - whole, axis).max() < 0.6 * steps(cut - whole, axis).max()
        at_borders = steps(tiled, axis)[[b + k for b in borders for k in (-2, -1, 0)]]
        assert at_borders.max() <= steps(whole, axis).max()


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Find where tiles begin by watching which latents the decoder is given."""
    seen: list[int] = []
    ramp = np.arange(length, dtype=np.float32)
    latents = np.broadcast_to(ramp[None, None, :, None], (1, 4, length, 2))

    def watch(part: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(int(part[0, 0, 0, 0]))
        return enlarge(part)

    tiled_decode(watch, latents, tile=tile, overlap=overlap)
    return seen


def test_default_tiles_are_of_the_size_models_are_made_for() -> None:
    assert (TILE, OVERLAP) == (64, 16)
    assert _starts(96, TILE, OVERLAP) == [0, 32]
    assert _starts(64, TILE, OVERLAP) == [0]
    assert tile_shape(40, 200) == (40, 64)


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (0, 0), (8, 5), (8, -1)])
def test_impossible_tiles_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(RequestError, match="overlap"):
        tiled_decode(enlarge, some_latents(1, 4, 20, 20), tile=tile, overlap=overlap)


def test_levels_round_as_numpy_does_for_diffusers() -> None:
    values = np.array([-1.0, 0.0, 0.5 / 255, 1.5 / 255, 0.999, 1.0, 7.0], np.float32)
    assert to_levels(values).tolist() == [0, 0, 0, 2, 255, 255, 255]
