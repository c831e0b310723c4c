from __future__ import annotations

import warnings

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError, RequestError
from sdvino.graph.clip_skip import select_hidden_state
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


@pytest.mark.parametrize("clip_skip", range(1, LAYERS + 1))
def test_earlier_layers_are_those_of_diffusers(clip_skip: int) -> None:
    model = read("text_encoder")
    select_hidden_state(model, clip_skip)
    output = Compiled(model).infer({"input_ids": IDS})
    expected, pooled = oracle(clip_skip)
    np.testing.assert_allclose(output["last_hidden_state"], expected, atol=1e-5)
    np.testing.assert_allclose(output["pooler_output"], pooled, atol=1e-5)


def test_zero_leaves_the_encoder_as_it_is() -> None:
    before = Compiled(read("text_encoder")).infer({"input_ids": IDS})["last_hidden_state"]
    model = read("text_encoder")
    select_hidden_state(model, 0)
    after = Compiled(model).infer({"input_ids": IDS})["last_hidden_state"]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("clip_skip", [-1, LAYERS + 1, 100])
def test_more_than_there_are_layers_is_refused(clip_skip: int) -> None:
    with pytest.raises(RequestError, match="clip_skip"):
        select_hidden_state(read("text_encoder"), clip_skip)


def compressed(how: str) -> ov.Model:
    model = read("text_encoder")
    if how == "8-bit weights":
        return nncf.compress_weights(model)
    model.reshape({"input_ids": [1, 77]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize(model, nncf.Dataset([IDS]), subset_size=1)


@pytest.mark.parametrize("how", ["8-bit weights", "8-bit everything"])
def test_compression_does_not_hide_the_layers(how: str) -> None:
    original = compressed(how)
    for clip_skip in range(1, LAYERS + 1):
        model = original.clone()
        select_hidden_state(model, clip_skip)
        state = Compiled(model).infer({"input_ids": IDS})["last_hidden_state"]
        # Rounding to 8 bits moves the states a little, a wrong layer by more than 1.
        np.testing.assert_allclose(state, oracle(clip_skip)[0], atol=0.2)
    with pytest.raises(RequestError, match=f"has {LAYERS} layers"):
        select_hidden_state(original.clone(), LAYERS + 1)


def test_a_graph_that_is_no_text_encoder_is_refused() -> None:
    model = read("unet")
    model.outputs[0].get_tensor().set_names({"last_hidden_state"})
    with pytest.raises(ModelFolderError, match="layer norm"):
        select_hidden_state(model, 1)
