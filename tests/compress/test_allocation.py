from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.compress.allocation import Option, allocate, least_bytes

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=4,
)
LAYERS = st.lists(OPTIONS, min_size=1, max_size=4)


def total(layers: list[list[Option]], chosen: list[int]) -> Option:
    taken = [options[i] for options, i in zip(layers, chosen, strict=True)]
    return Option(sum(o.bytes for o in taken), sum(o.damage for o in taken))


def best(layers: list[list[Option]], budget: int) -> float:
    """By trying everything."""
    every = (total(layers, list(c)) for c in itertools.product(*(range(len(o)) for o in layers)))
    return min((t.damage for t in every if t.bytes <= budget), default=float("inf"))


@given(layers=LAYERS, extra=st.integers(0, 100))
def test_the_choice_fits_and_is_as_good_as_greed_can_be(
    layers: list[list[Option]], extra: int
) -> None:
    budget = least_bytes(layers) + extra
    found = total(layers, allocate(layers, budget))
    assert found.bytes <= budget
    largest = max(max(o.bytes for o in options) for options in layers)
    assert found.damage <= best(layers, budget - largest) + 1e-9


@given(layers=LAYERS)
def test_with_room_for_all_every_layer_takes_its_best(layers: list[list[Option]]) -> None:
    found = total(layers, allocate(layers, 10_000))
    assert found.damage == pytest.approx(sum(min(o.damage for o in options) for options in layers))


def test_bytes_go_where_they_prevent_most() -> None:
    small, large = Option(10, 4.0), Option(20, 0.0)
    layers = [[small, large], [Option(10, 1.0), Option(20, 0.0)], [small, Option(40, 0.0)]]
    assert allocate(layers, 30) == [0, 0, 0]
    assert allocate(layers, 40) == [1, 0, 0]
    # The exchange that would come next does not fit; another that does is taken.
    assert allocate(layers, 50) == [1, 1, 0]
    assert allocate(layers, 80) == [1, 1, 1]


def test_what_cannot_fit_is_said() -> None:
    with pytest.raises(ValueError, match="20 bytes are needed"):
        allocate([[Option(10, 1.0)], [Option(10, 1.0)]], 19)
