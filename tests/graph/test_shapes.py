from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.walk import reshape_static
from tests.graph.exported import Compiled, read, some_latents

SHAPES = {"sample": [2, 4, 8, 16], "encoder_hidden_states": [2, 77, 16], "timestep": [1]}


@pytest.mark.slow
def test_a_fixed_unet_computes_the_same() -> None:
    inputs = {
        "sample": some_latents(2, 4, 8, 16),
        "encoder_hidden_states": some_latents(2, 77, 16, seed=1),
        "timestep": np.array([500], np.int64),
    }
    before = np.array(Compiled(read("unet")).infer(inputs)["out_sample"])
    model = read("unet")
    reshape_static(model, SHAPES)
    assert not model.is_dynamic()
    np.testing.assert_allclose(Compiled(model).infer(inputs)["out_sample"], before, atol=1e-5)


def test_a_scalar_timestep_fits_a_vector_and_the_other_way() -> None:
    model = read("unet")
    reshape_static(model, {**SHAPES, "timestep": []})
    assert list(model.input("timestep").get_shape()) == [1]
    scalar = ops.parameter([], ov.Type.f32, name="timestep")
    scalar.output(0).set_names({"timestep"})
    model = ov.Model([ops.result(ops.add(scalar, np.float32(1)))], [scalar], "scalar")
    reshape_static(model, {"timestep": [1]})
    assert list(model.input("timestep").get_shape()) == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelFolderError, match="sample"):
        reshape_static(read("unet"), {**SHAPES, "sample": [2, 5, 8, 16]})
    with pytest.raises(ModelFolderError, match="no input 'picture'"):
        reshape_static(read("unet"), {"picture": [1]})
