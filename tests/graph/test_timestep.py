from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.timestep import float_timestep
from tests.graph.exported import Compiled, read, some_latents, torch_pipeline


def run(model: ov.Model, timestep: float, dtype: type[np.generic]) -> NDArray[np.float32]:
    output = Compiled(model).infer(
        {
            "sample": some_latents(2, 4, 8, 8),
            "encoder_hidden_states": some_latents(2, 77, 16, seed=1),
            "timestep": np.array([timestep], dtype),
        }
    )
    return np.array(output["out_sample"])


def oracle(timestep: float) -> NDArray[np.float32]:
    with torch.no_grad():
        sample = torch.from_numpy(some_latents(2, 4, 8, 8))
        text = torch.from_numpy(some_latents(2, 77, 16, seed=1))
        result: NDArray[np.float32] = torch_pipeline().unet(sample, timestep, text).sample.numpy()
    return result


def test_fractional_timesteps_reach_the_network() -> None:
    model = read("unet")
    float_timestep(model)
    fractional = run(model, 687.15, np.float32)
    np.testing.assert_allclose(fractional, oracle(687.15), atol=2e-5)
    assert np.abs(fractional - oracle(687.0)).max() > 1e-4


@pytest.mark.slow
def test_whole_timesteps_compute_what_the_export_computed() -> None:
    model = read("unet")
    before = run(model, 687, np.int64)
    float_timestep(model)
    np.testing.assert_allclose(run(model, 687.0, np.float32), before, atol=1e-6)


def test_twice_is_once() -> None:
    model = read("unet")
    float_timestep(model)
    float_timestep(model)
    assert model.input("timestep").get_element_type() == ov.Type.f32


def small(*steps: str) -> ov.Model:
    """timestep -> the named steps -> f32 -> doubled."""
    timestep = ops.parameter([1], ov.Type.i64, name="timestep")
    timestep.output(0).set_names({"timestep"})
    node = timestep
    for step in steps:
        one = np.array([1], np.int64)
        node = ops.convert(node, "i32") if step == "i32" else ops.add(node, one)
    result = ops.multiply(ops.convert(node, "f32"), np.float32(2.0))
    result.output(0).set_names({"double"})
    return ov.Model([ops.result(result)], [timestep], "small")


def test_integer_conversions_on_the_way_are_taken_out() -> None:
    model = small("i32")
    float_timestep(model)
    doubled = Compiled(model).infer({"timestep": np.array([0.25], np.float32)})["double"]
    np.testing.assert_array_equal(doubled, [0.5])


def test_a_graph_that_counts_in_whole_numbers_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="whole numbers"):
        float_timestep(small("plus one"))


def test_a_graph_without_a_timestep_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="no input 'timestep'"):
        float_timestep(read("vae_decoder"))
