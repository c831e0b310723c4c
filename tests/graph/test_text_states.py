from __future__ import annotations

import warnings

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError, RequestError
from sdvino.graph.text_states import POOLED, give_states, state_name
from tests.graph.exported import LAYERS, Compiled, read, torch_pipeline

IDS = np.array([[3, 44, 101, 7] + [520] * 73], np.int64)


def oracle(clip_skip: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Encode as diffusers' encode_prompt does when clip_skip is given."""
    encoder = torch_pipeline().text_encoder
    with torch.no_grad():
        output = encoder(input_ids=torch.from_numpy(IDS), output_hidden_states=True)
        state = output.hidden_states[-(clip_skip + 1)]
        normed = encoder.text_model.final_layer_norm(state)
    return normed.numpy(), output.pooler_output.numpy()


def plain(clip_skip: int) -> NDArray[np.float32]:
    """A layer as diffusers' pipelines with two text encoders take it."""
    with torch.no_grad():
        output = torch_pipeline().text_encoder(torch.from_numpy(IDS), output_hidden_states=True)
    state: NDArray[np.float32] = output.hidden_states[-(clip_skip + 1)].numpy()
    return state


def test_earlier_layers_are_those_of_diffusers() -> None:
    model = read("text_encoder")
    give_states(model, range(LAYERS + 1), final_norm=True)
    output = Compiled(model).infer({"input_ids": IDS})
    before = Compiled(read("text_encoder")).infer({"input_ids": IDS})["last_hidden_state"]
    np.testing.assert_allclose(output[state_name(0)], before, atol=1e-6)
    for clip_skip in range(1, LAYERS + 1):
        expected = oracle(clip_skip)[0]
        np.testing.assert_allclose(output[state_name(clip_skip)], expected, atol=1e-5)


def test_layers_without_the_norm() -> None:
    model = read("text_encoder")
    give_states(model, [1, 2], final_norm=False)
    assert len(model.outputs) == 2
    output = Compiled(model).infer({"input_ids": IDS})
    for clip_skip in (1, 2):
        np.testing.assert_allclose(output[state_name(clip_skip)], plain(clip_skip), atol=1e-5)


def with_every_layer() -> ov.Model:
    """The layout in which optimum-intel exports the text encoders of SDXL."""
    model = read("text_encoder")
    states = []
    for number in range(LAYERS + 1):
        state = ops.constant(np.full((1, 77, 16), number, np.float32))
        state.output(0).set_names({f"hidden_states.{number}"})
        states.append(ops.result(state))
    pooled = model.output("pooler_output")
    pooled.get_tensor().set_names({POOLED})
    model.add_results(states)
    return model


def test_layers_given_by_name_are_taken() -> None:
    model = with_every_layer()
    give_states(model, [1], final_norm=False, pooled=True)
    output = Compiled(model).infer({"input_ids": IDS})
    assert len(model.outputs) == 2
    np.testing.assert_array_equal(output[state_name(1)], LAYERS - 1)
    np.testing.assert_allclose(output[POOLED], oracle(1)[1], atol=1e-5)


def test_a_pooled_state_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelFolderError, match=POOLED):
        give_states(read("text_encoder"), [1], final_norm=False, pooled=True)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("clip_skip", [-1, LAYERS + 1, 100])
def test_more_than_there_are_layers_is_refused(clip_skip: int, final_norm: bool) -> None:
    with pytest.raises(RequestError, match="clip_skip"):
        give_states(read("text_encoder"), [clip_skip], final_norm=final_norm)


def compressed(how: str) -> ov.Model:
    model = read("text_encoder")
    if how == "8-bit weights":
        return nncf.compress_weights(model)
    model.reshape({"input_ids": [1, 77]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize(model, nncf.Dataset([IDS]), subset_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["8-bit weights", "8-bit everything"])
def test_compression_does_not_hide_the_layers(how: str) -> None:
    original = compressed(how)
    for clip_skip in range(1, LAYERS + 1):
        model = original.clone()
        give_states(model, [clip_skip], final_norm=True)
        state = Compiled(model).infer({"input_ids": IDS})[state_name(clip_skip)]
        # Rounding to 8 bits moves the states a little, a wrong layer by more than 1.
        np.testing.assert_allclose(state, oracle(clip_skip)[0], atol=0.4)
    with pytest.raises(RequestError, match=f"has {LAYERS} layers"):
        give_states(original.clone(), [LAYERS + 1], final_norm=True)


def test_a_graph_that_is_no_text_encoder_is_refused() -> None:
    model = read("unet")
    model.outputs[0].get_tensor().set_names({"last_hidden_state"})
    with pytest.raises(ModelFolderError, match="layer norm"):
        give_states(model, [1], final_norm=True)
