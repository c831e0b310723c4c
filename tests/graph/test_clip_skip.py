from __future__ import annotations

import numpy as np
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


def test_compressed_weights_do_not_hide_the_layers() -> None:
    import nncf

    model = nncf.compress_weights(read("text_encoder"))
    select_hidden_state(model, LAYERS)
    with pytest.raises(RequestError, match=f"has {LAYERS} layers"):
        select_hidden_state(nncf.compress_weights(read("text_encoder")), LAYERS + 1)


def test_a_graph_that_is_no_text_encoder_is_refused() -> None:
    model = read("unet")
    model.outputs[0].get_tensor().set_names({"last_hidden_state"})
    with pytest.raises(ModelFolderError, match="layer norm"):
        select_hidden_state(model, 1)
