from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.runtime.memory_plan import PartSizes, measure_parts, plan_memory
from tests.conftest import SHAPES

GB = 10**9
#: About those of Stable Diffusion 1.5 in 8 bits, 512 x 512.
SIZES = PartSizes(
    process=GB // 5,
    text=GB * 14 // 100,
    unet=GB * 135 // 100,
    decoder=GB * 75 // 1000,
    unet_maps=GB * 12 // 100,
    decoder_maps=[(None, GB * 8 // 10), (32, GB // 5)],
)


def test_without_a_limit_only_the_text_encoder_goes() -> None:
    plan = plan_memory(SIZES, None)
    assert plan.release_text
    assert (plan.release_models, plan.tile, plan.pieces) == (False, None, 1)
    small = replace(SIZES, text=GB // 100)
    assert not plan_memory(small, None).release_text


def test_what_costs_least_comes_first() -> None:
    seen = []
    for tenths in range(40, 7, -1):
        plan = plan_memory(SIZES, tenths * GB // 10)
        assert plan.peak <= tenths * GB // 10
        seen.append((plan.release_models, plan.tile is not None, plan.pieces))
    assert seen == sorted(seen)
    assert seen[0] == (False, False, 1)
    assert seen[-1][2] > 1


def test_a_picture_drawn_once_keeps_nothing_that_is_done_with() -> None:
    plan = plan_memory(SIZES, None, once=True)
    assert (plan.release_text, plan.release_models, plan.tile, plan.pieces) == (True, True, None, 1)
    assert plan.peak < plan_memory(SIZES, None).peak - GB // 2
    assert plan_memory(SIZES, None, once=True, low_memory=True).pieces >= 8
    assert plan_memory(SIZES, None, once=True, tiling=True).tile == 32


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(RequestError, match="--max-memory"):
        plan_memory(SIZES, GB // 2)
    plan = plan_memory(SIZES, GB // 2, strict=False)
    assert (plan.pieces, plan.release_models) == (1, True)


def test_low_memory_is_under_a_gigabyte() -> None:
    plan = plan_memory(SIZES, None, low_memory=True)
    assert plan.pieces >= 8
    assert plan.tile == 32
    assert plan.peak < GB


def test_tiles_on_request_and_never() -> None:
    assert plan_memory(SIZES, None, tiling=True).tile == 32
    with pytest.raises(RequestError):
        plan_memory(SIZES, GB, tiling=False)


@given(st.integers(1, 10 * GB), st.booleans(), st.sampled_from([None, True, False]))
def test_no_plan_is_over_its_limit(limit: int, low: bool, tiling: bool | None) -> None:
    try:
        plan = plan_memory(SIZES, limit, tiling=tiling, low_memory=low)
    except RequestError:
        return
    assert plan.peak <= limit
    if plan.load_ahead:
        assert plan.pieces == 1
        held = SIZES.process + SIZES.text + SIZES.unet
        assert held + (0 if plan.release_models else SIZES.decoder) <= plan.peak


def test_a_unet_is_loaded_ahead_where_it_does_not_raise_the_peak() -> None:
    assert plan_memory(SIZES, None).load_ahead
    assert not plan_memory(SIZES, None, low_memory=True).load_ahead
    # A single picture peaks with the UNet alone, and the text encoder is more than its activations.
    assert not plan_memory(SIZES, None, once=True).load_ahead
    assert plan_memory(replace(SIZES, text=GB // 20), None, once=True).load_ahead


def test_the_demo_model_is_measured() -> None:
    folder = ModelFolder.open(SHAPES)
    sizes = measure_parts(folder, 128, 128)
    assert sizes.unet > sizes.text > 0
    assert [side for side, _ in sizes.decoder_maps] == [None]
    large = measure_parts(folder, 1024, 1024)
    assert [side for side, _ in large.decoder_maps] == [None, 64, 32]
    tiny = measure_parts(folder, 1024, 1024, tiny=True)
    assert tiny.decoder < large.decoder
    assert len(tiny.decoder_maps) == 1
