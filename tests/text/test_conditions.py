"""What the UNet is told, on graphs of a few nodes: text, pooled text, sizes, guidance."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdvino import RequestError, StableDiffusionPipeline
from sdvino.folder.index import ModelFolder
from sdvino.request import Request
from sdvino.text.conditions import Embeddings
from tests.text.folders import vocabulary, write_legacy
from tests.tiny_folder import POOLED, TOKENS, WIDTHS, edit_json, make_tiny_xl_folder

PROMPT = "red circle on blue"
Array = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers of both layouts, each padding in its own way."""
    path = make_tiny_xl_folder(tmp_path_factory.mktemp("xl") / "model")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(path / name)
        write_legacy(path / name, pad=pad)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


def inputs(
    pipe: StableDiffusionPipeline, embeddings: Embeddings | None = None, **options: Any
) -> tuple[dict[str, Array], dict[str, Array] | None]:
    given: dict[str, Any] = {"prompts": (PROMPT,), "seed": 0, "guidance_scale": 5.0, **options}
    request = Request(**given).resolve(pipe.folder)
    return pipe.conditioner.unet_inputs(request, request.jobs[0], embeddings)


def test_each_tokenizer_pads_in_its_own_way(pipe: StableDiffusionPipeline) -> None:
    vocab = vocabulary()[0]
    first, second = (pipe.conditioner.tokenizer(n) for n in ("text_encoder", "text_encoder_2"))
    assert first.encode("red").ids[0, -1] == vocab["<|endoftext|>"]
    assert second.encode("red").ids[0, -1] == vocab["!"] == 0


def test_states_of_both_encoders_stand_side_by_side(pipe: StableDiffusionPipeline) -> None:
    cond, _ = inputs(pipe)
    states = cond["encoder_hidden_states"]
    assert states.shape == (1, TOKENS, sum(WIDTHS))
    assert cond["text_embeds"].shape == (1, POOLED)
    # The graph's layers are numbered: the last is 3, so the one before adds 2, and so on.
    one_less, _ = inputs(pipe, clip_skip=1)
    np.testing.assert_allclose(states - one_less["encoder_hidden_states"], 1.0, atol=1e-5)
    np.testing.assert_array_equal(one_less["text_embeds"], cond["text_embeds"])


def test_clip_skip_counts_for_the_prompt_alone(pipe: StableDiffusionPipeline) -> None:
    _, whole = inputs(pipe, negative_prompts=("blue",))
    _, skipped = inputs(pipe, negative_prompts=("blue",), clip_skip=1)
    assert whole is not None
    assert skipped is not None
    np.testing.assert_array_equal(whole["encoder_hidden_states"], skipped["encoder_hidden_states"])
    with pytest.raises(RequestError, match="clip_skip"):
        inputs(pipe, clip_skip=3)


def test_sizes_follow_the_picture(pipe: StableDiffusionPipeline) -> None:
    cond, uncond = inputs(pipe, height=64, width=192)
    assert uncond is not None
    for given in (cond, uncond):
        assert given["time_ids"].tolist() == [[64, 192, 0, 0, 64, 192]]
        assert given["time_ids"].dtype == np.float32


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_not(
    pipe: StableDiffusionPipeline,
) -> None:
    _, none = inputs(pipe)
    _, empty = inputs(pipe, negative_prompts=("",))
    assert none is not None
    assert empty is not None
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not none[name].any()
        assert empty[name].any()


def test_the_index_may_ask_for_an_empty_text(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    _, uncond = inputs(StableDiffusionPipeline.from_pretrained(copy))
    assert uncond is not None
    assert uncond["encoder_hidden_states"].any()


def test_no_guidance_asks_for_no_negative_prompt(pipe: StableDiffusionPipeline) -> None:
    assert inputs(pipe, guidance_scale=0.0)[1] is None
    assert inputs(pipe, guidance_scale=1.0)[1] is None


def test_a_picture_is_made(pipe: StableDiffusionPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "output_type": "latent"}
    plain = pipe(PROMPT, **options).images
    assert plain.shape == (1, 4, 16, 16)
    cond, uncond = inputs(pipe)
    assert uncond is not None
    embedded = pipe(
        prompt_embeds=cond["encoder_hidden_states"],
        pooled_prompt_embeds=cond["text_embeds"],
        negative_prompt_embeds=uncond["encoder_hidden_states"],
        negative_pooled_prompt_embeds=uncond["text_embeds"],
        **options,
    ).images
    np.testing.assert_array_equal(plain, embedded)
    assert not np.array_equal(plain, pipe(PROMPT, negative_prompt="", **options).images)


STATES = np.zeros((1, TOKENS, sum(WIDTHS)), np.float32)
ONE_POOLED = np.zeros((1, POOLED), np.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_embeds": STATES}, "give pooled_prompt_embeds"),
        (
            {"prompt": PROMPT, "negative_prompt_embeds": STATES},
            "give negative_pooled_prompt_embeds",
        ),
        ({"prompt_embeds": STATES, "pooled_prompt_embeds": ONE_POOLED[:, :-1]}, "pooled"),
        ({"prompt_embeds": STATES[..., 1:], "pooled_prompt_embeds": ONE_POOLED}, "embeddings"),
        ({"prompt_embeds": STATES, "pooled_prompt_embeds": STATES}, r"\[N, width\]"),
        ({"prompt_embeds": STATES + np.nan, "pooled_prompt_embeds": ONE_POOLED}, "NaN"),
        (
            {"prompt": PROMPT, "negative_prompt": "x", "negative_prompt_embeds": STATES},
            "not both",
        ),
        (
            {"prompt": [PROMPT] * 3, "pooled_prompt_embeds": np.concatenate([ONE_POOLED] * 2)},
            "one for each",
        ),
    ],
)
def test_embeddings_that_do_not_fit(
    pipe: StableDiffusionPipeline, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        pipe(num_inference_steps=1, seed=0, output_type="latent", guidance_scale=5.0, **options)


def test_a_plain_model_takes_no_pooled_state(shapes: Path) -> None:
    pipe = StableDiffusionPipeline(ModelFolder.open(shapes))
    with pytest.raises(RequestError, match="takes no pooled_prompt_embeds"):
        pipe(PROMPT, num_inference_steps=1, seed=0, pooled_prompt_embeds=ONE_POOLED)
