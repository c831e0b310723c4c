from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.walk import MOST_ADDED, check_folding

SIDE = 2**14  # its square is over the limit


def graph(large: ov.Node, shape: list[int] | None = None) -> ov.Model:
    given = ops.parameter([1, 4] if shape is None else shape, ov.Type.f32)
    return ov.Model([ops.add(given, ops.reduce_mean(large, [0, 1]))], [given])


def of_the_shape_of_the_input() -> ov.Model:
    given = ops.parameter([1, SIDE], ov.Type.f32)
    side = ops.reduce_prod(ops.shape_of(given), [0], True)
    large = ops.broadcast(np.float32(1), ops.concat([side, side], 0))
    return ov.Model([ops.add(given, ops.reduce_mean(large, [0, 1]))], [given])


LARGE = {
    "broadcast": lambda: graph(ops.broadcast(np.float32(1), [SIDE, SIDE])),
    "tile": lambda: graph(ops.tile(np.ones((1, 1), np.float32), [SIDE, SIDE])),
    "an outer product": lambda: graph(
        ops.add(np.ones((SIDE, 1), np.float32), np.ones((1, SIDE), np.float32))
    ),
    "many": lambda: graph(
        ops.concat([ops.broadcast(np.float32(i), [1, MOST_ADDED // 8]) for i in range(9)], 0)
    ),
    "of the input's shape": of_the_shape_of_the_input,
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_what_would_fill_the_memory_is_refused(make: object) -> None:
    with pytest.raises(ModelFolderError, match="unet makes constants"):
        check_folding(make(), "unet")  # type: ignore[operator]


def test_what_depends_on_the_input_is_no_constant() -> None:
    given = ops.parameter([SIDE, 1], ov.Type.f32)
    product = ops.multiply(given, np.ones((1, SIDE), np.float32))
    check_folding(ov.Model([ops.reduce_mean(product, [0, 1])], [given]), "unet")


def test_weights_of_small_numbers_are_not_counted() -> None:
    weights = ops.convert(np.ones((SIDE, 8), np.int8), "f32")
    scaled = ops.multiply(weights, np.ones((SIDE, 1), np.float32))
    check_folding(graph(scaled), "unet")
