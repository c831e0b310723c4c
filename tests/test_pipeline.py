"""The pipeline on the bundled demo model: arguments, seeds, callbacks, cancelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdvino import Cancelled, RequestError, RunSettings, StableDiffusionPipeline
from sdvino.folder.index import ModelFolder
from sdvino.graph.text_keys import TEXT
from sdvino.outputs import PictureEvent, StepEvent
from sdvino.request import Request
from sdvino.runtime.components import Components
from sdvino.runtime.network import PREDICTION, Network, NetworkPlan, Stage

PROMPT = "a big red circle on a blue background"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained()


def latents_of(pipe: StableDiffusionPipeline, prompt: Any = PROMPT, **options: Any) -> Any:
    options = {"seed": 3, "num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(prompt, **options).images


def test_a_picture_has_the_model_s_size(pipe: StableDiffusionPipeline) -> None:
    out = pipe(PROMPT, num_inference_steps=2, seed=0)
    (image,) = out.images
    assert isinstance(image, Image.Image)
    assert image.size == (pipe.folder.width, pipe.folder.height)
    assert out.seeds == [0]
    assert out.timings.denoise > 0


def test_the_same_seed_gives_the_same_picture(pipe: StableDiffusionPipeline) -> None:
    first = np.asarray(pipe(PROMPT, num_inference_steps=2, seed=5).images[0])
    again = np.asarray(pipe(PROMPT, num_inference_steps=2, seed=5).images[0])
    other = np.asarray(pipe(PROMPT, num_inference_steps=2, seed=6).images[0])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_picture_of_a_batch_has_the_next_seed(pipe: StableDiffusionPipeline) -> None:
    prompts = ["a red circle", "a blue square"]
    out = pipe(
        prompts, num_inference_steps=2, seed=10, num_images_per_prompt=2, output_type="latent"
    )
    assert out.seeds == [10, 11, 12, 13]
    repeated = [prompt for prompt in prompts for _ in range(2)]
    for i, (prompt, seed) in enumerate(zip(repeated, out.seeds, strict=True)):
        assert np.array_equal(out.images[i : i + 1], latents_of(pipe, prompt, seed=seed))


def test_output_types_agree(pipe: StableDiffusionPipeline) -> None:
    pil = np.asarray(pipe(PROMPT, num_inference_steps=2, seed=1).images[0])
    floats = pipe(PROMPT, num_inference_steps=2, seed=1, output_type="np").images
    assert floats.dtype == np.float32
    assert floats.shape == (1, *pil.shape)
    assert np.abs(floats[0] * 255 - pil).max() <= 1.01


def test_noise_given_is_the_noise_drawn(pipe: StableDiffusionPipeline) -> None:
    from sdvino.diffusion.noise import make_noise

    drawn = latents_of(pipe, seed=3)
    given = latents_of(pipe, seed=99, latents=make_noise("torch", 3).randn(drawn.shape))
    assert np.array_equal(drawn, given)


def test_embeddings_stand_in_for_prompts(pipe: StableDiffusionPipeline) -> None:
    seen: list[Any] = []

    def remember(text: str) -> Any:
        request = Request(prompts=(text,), seed=0).resolve(pipe.folder)
        return pipe.conditioner.text_states(request, request.jobs[0])[0].hidden

    seen = [remember(PROMPT), remember("")]
    direct = latents_of(pipe)
    embedded = latents_of(pipe, None, prompt_embeds=seen[0], negative_prompt_embeds=seen[1])
    assert np.array_equal(direct, embedded)


def test_guidance_of_one_asks_once(pipe: StableDiffusionPipeline) -> None:
    with_guidance = pipe(PROMPT, num_inference_steps=3, seed=0, guidance_scale=4, scheduler="euler")
    without = pipe(PROMPT, num_inference_steps=3, seed=0, guidance_scale=1, scheduler="euler")
    assert with_guidance.timings.unet_evaluations == 6
    assert without.timings.unet_evaluations == 3


def test_the_negative_prompt_counts(pipe: StableDiffusionPipeline) -> None:
    assert not np.array_equal(latents_of(pipe), latents_of(pipe, negative_prompt="a blue square"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 96), (136, 128), (256, 64)])
def test_other_sizes(pipe: StableDiffusionPipeline, size: tuple[int, int]) -> None:
    height, width = size
    image = pipe(PROMPT, num_inference_steps=1, seed=0, height=height, width=width).images[0]
    assert image.size == (width, height)


def test_words_past_the_limit_are_named(pipe: StableDiffusionPipeline) -> None:
    out = pipe(PROMPT + " and a cat" * 100 + " zebra", num_inference_steps=1, seed=0)
    assert out.dropped[0].endswith("zebra")
    assert pipe(PROMPT, num_inference_steps=1, seed=0).dropped == [""]


def test_the_callback_sees_every_step_and_may_change_latents(
    pipe: StableDiffusionPipeline,
) -> None:
    steps: list[int] = []

    def watch(_: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return values

    def silence(_: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(values["latents"])} if step == 2 else values

    plain = latents_of(pipe, num_inference_steps=3)
    assert np.array_equal(
        plain, latents_of(pipe, num_inference_steps=3, callback_on_step_end=watch)
    )
    assert steps == [0, 1, 2]
    assert not latents_of(pipe, num_inference_steps=3, callback_on_step_end=silence).any()


def test_the_callback_may_cancel(pipe: StableDiffusionPipeline) -> None:
    def stop(*_: Any) -> None:
        raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        latents_of(pipe, callback_on_step_end=stop)
    assert latents_of(pipe).shape[0] == 1


def test_the_stream_yields_every_step_then_the_picture(pipe: StableDiffusionPipeline) -> None:
    request = Request(prompts=(PROMPT,), num_inference_steps=3, seed=0).resolve(pipe.folder)
    events = list(pipe.stream(request))
    assert [type(event) for event in events] == [StepEvent] * 3 + [PictureEvent]
    step = events[0]
    assert isinstance(step, StepEvent)
    assert pipe.preview(step.denoised).size[0] >= 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "prompt"),
        ({"latents": np.zeros((1, 4, 5, 5), np.float32)}, "latents"),
        ({"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"output_type": "tensor"}, "output type"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative prompts"),
        ({"prompt": [1]}, "prompt"),
        ({"prompt": [], "seed": 0}, "prompt"),
        ({"height": 100}, "multiple"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
def test_wrong_arguments(
    pipe: StableDiffusionPipeline, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        pipe(**{"prompt": PROMPT, "seed": 0, **options})


class GivesBack:
    """Stands for the UNet: predicts what it is given."""

    input_names = (frozenset({"sample"}), frozenset({"timestep"}), frozenset({TEXT}))

    def __init__(self) -> None:
        self.timesteps: list[float] = []

    def infer(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.infer_each([inputs])[0]

    def infer_each(
        self, inputs: Sequence[Mapping[str, Any]], *, together: bool = False
    ) -> list[Mapping[str, Any]]:
        self.timesteps += [float(given["timestep"][0]) for given in inputs]
        return [{PREDICTION: np.array(given["sample"])} for given in inputs]

    def unload(self) -> None: ...


class WithUnet(Components):
    """The folder's components, with another UNet."""

    def __init__(self, folder: ModelFolder, stage: Stage) -> None:
        super().__init__(folder, RunSettings())
        self._stage_given = stage

    def unets(self, size: tuple[int, int], plans: Sequence[NetworkPlan]) -> list[Network]:
        return [Network([self._stage_given]) for _ in plans]


def test_components_that_are_passed_in_are_what_runs(pipe: StableDiffusionPipeline) -> None:
    stage = GivesBack()
    fake = StableDiffusionPipeline(pipe.folder, components=WithUnet(pipe.folder, stage))
    out = fake(PROMPT, num_inference_steps=3, seed=0, guidance_scale=4, scheduler="euler")
    assert out.images[0].size == (pipe.folder.width, pipe.folder.height)
    assert stage.timesteps == sorted(stage.timesteps, reverse=True)
    assert len(stage.timesteps) == out.timings.unet_evaluations == 6
    assert "unet" not in fake.components.parts


def test_an_unknown_argument_raises(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match="strength"):
        pipe(PROMPT, strength=0.5)  # type: ignore[call-arg]
