from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError, SdvinoError
from sdvino.text.encoder import TextEncoder
from sdvino.text.tokenizer import ClipTokenizer
from tests.graph.exported import Compiled, read, torch_pipeline
from tests.text.folders import write_legacy


@pytest.fixture
def tokenizer(tmp_path: Path) -> ClipTokenizer:
    return ClipTokenizer.from_folder(write_legacy(tmp_path))


def test_states_are_those_of_diffusers(tokenizer: ClipTokenizer) -> None:
    encoder = TextEncoder(Compiled(read("text_encoder")), tokenizer)
    for prompt in ("a red circle on the blue house", "", "the lighthouse " * 60):
        with torch.no_grad():
            expected, _ = torch_pipeline().encode_prompt(prompt, "cpu", 1, False)
        encoded = encoder.encode_prompt(prompt)
        state = encoded.states["last_hidden_state"]
        assert state.dtype == np.float32
        assert state.shape == (1, 77, 16)
        np.testing.assert_allclose(state, expected.numpy(), atol=1e-5)
        assert encoded.pooled is not None
        assert encoded.pooled.shape == (1, 16)
        assert bool(encoded.dropped) == (len(prompt) > 300)


class Counting:
    """A component that says how often it ran, in one buffer that it writes again."""

    def __init__(self) -> None:
        self.calls = 0
        self.dtypes: list[np.dtype[Any]] = []
        self._buffer = np.zeros((1, 77, 4), np.float32)

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        self.calls += 1
        self.dtypes.append(inputs["input_ids"].dtype)
        self._buffer[...] = self.calls
        return {"last_hidden_state": self._buffer}


def test_each_prompt_is_encoded_once(tokenizer: ClipTokenizer) -> None:
    component = Counting()
    encoder = TextEncoder(component, tokenizer, cached=2)
    first = encoder.encode_prompt("red")
    encoder.encode_prompt("blue")
    assert encoder.encode_prompt("red") is first
    assert component.calls == 2
    encoder.encode_prompt("green")  # puts out blue, which was used longest ago
    assert encoder.encode_prompt("red") is first
    assert component.calls == 3
    encoder.encode_prompt("blue")
    assert component.calls == 4


def test_states_outlive_the_buffer_and_cannot_be_written(tokenizer: ClipTokenizer) -> None:
    encoder = TextEncoder(Counting(), tokenizer)
    first = encoder.encode_prompt("red").states["last_hidden_state"]
    encoder.encode_prompt("blue")
    np.testing.assert_array_equal(first, 1.0)
    with pytest.raises(ValueError, match="read-only"):
        first[...] = 0


def test_ids_are_int64(tokenizer: ClipTokenizer) -> None:
    component = Counting()
    encoded = TextEncoder(component, tokenizer).encode_prompt("red")
    assert component.dtypes == [np.dtype(np.int64)]
    assert encoded.pooled is None


def test_a_tokenizer_of_another_model_is_refused(tokenizer: ClipTokenizer) -> None:
    TextEncoder(Counting(), tokenizer, vocab_size=tokenizer.vocab_size)
    with pytest.raises(ModelFolderError, match="belong together"):
        TextEncoder(Counting(), tokenizer, vocab_size=tokenizer.vocab_size - 1)


class Broken:
    def __init__(self, outputs: dict[str, NDArray[Any]]) -> None:
        self._outputs = outputs

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self._outputs


def test_outputs_that_cannot_be_used_are_named(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(ModelFolderError, match="last_hidden_state"):
        TextEncoder(Broken({"logits": np.zeros(1)}), tokenizer).encode_prompt("red")
    nan = np.full((1, 77, 4), np.nan, np.float32)
    with pytest.raises(SdvinoError, match="f32"):
        TextEncoder(Broken({"last_hidden_state": nan}), tokenizer).encode_prompt("red")
