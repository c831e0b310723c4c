"""The UNet of the demo model as the loop asks it: modes, caching, pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdvino import (
    ModelFolderError,
    RequestError,
    RunSettings,
    SpeedSettings,
    StableDiffusionPipeline,
)
from sdvino.graph.cut import DEEP
from sdvino.outputs import PictureEvent
from sdvino.request import Request
from sdvino.runtime.denoising import guidance_mode, unet_plans
from sdvino.runtime.memory_plan import MemoryPlan
from sdvino.runtime.network import PREDICTION, Branch, Network, Pool
from sdvino.settings import FAST, DeviceSettings, GuidanceMode

PROMPT = "a big red circle on a blue background"
OPTIONS: dict[str, Any] = {
    "seed": 3,
    "num_inference_steps": 4,
    "scheduler": "euler",
    "guidance_scale": 3.0,
    "output_type": "latent",
}


#: What bf16, where it is fast, rounds off is more than what is looked for.
IN_F32 = DeviceSettings(precision="f32")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(settings=RunSettings(default=IN_F32))


class Adds:
    """A stage that adds one to a tensor."""

    def __init__(self, takes: str, gives: str) -> None:
        self.input_names = (frozenset({takes}),)
        self._takes, self._gives = takes, gives
        #: What was done with it, in order.
        self.calls: list[str] = []

    def infer(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        self.calls.append("infer")
        return {self._gives: inputs[self._takes] + 1}

    def infer_each(
        self, inputs: Sequence[Mapping[str, Any]], *, together: bool = False
    ) -> list[Mapping[str, Any]]:
        return [self.infer(given) for given in inputs]

    def unload(self) -> None:
        self.calls.append("unload")


def three() -> list[Adds]:
    return [Adds("sample", "shallow"), Adds("shallow", "deep"), Adds("deep", PREDICTION)]


def zeros() -> Any:
    return np.zeros((1, 4, 2, 2), np.float32)


def test_stages_hand_on_what_they_give() -> None:
    network = Network(three())
    (found,) = network.evaluate(zeros(), 1.0, 0, [Branch({})])
    assert (found == 3).all()
    outer = Network([Network(three(), input_names=["sample"])])  # a network is a stage too
    assert (outer.evaluate(zeros(), 1.0, 0, [Branch({})])[0] == 3).all()
    with pytest.raises(ModelFolderError, match="nothing gives"):
        Network([Adds("text", PREDICTION)]).evaluate(zeros(), 1.0, 0, [Branch({})])
    with pytest.raises(ModelFolderError, match=PREDICTION):
        Network([Adds("sample", "other")]).evaluate(zeros(), 1.0, 0, [Branch({})])


def test_what_a_stage_gave_is_used_again_between_steps() -> None:
    stages = three()
    network = Network(stages, reused=(DEEP,), interval=2)
    branches = [Branch({}), Branch({})]
    found = [network.evaluate(zeros() + step, 1.0, step, branches)[1].max() for step in range(4)]
    assert found == [3, 3, 5, 5]
    assert [len(stage.calls) for stage in stages] == [8, 4, 8]
    # A branch that has nothing kept is no reason to use what is not there.
    assert network.evaluate(zeros(), 1.0, 3, [Branch({})])[0].max() == 3


def test_in_turn_each_stage_runs_on_all_and_is_unloaded() -> None:
    stages = three()
    shares: list[float] = []
    pools: list[Pool] = [{"sample": zeros() + number} for number in range(2)]
    Network(stages, in_turn=True).run(pools, progress=shares.append)
    assert [stage.calls for stage in stages] == [["infer", "infer", "unload"]] * 3
    assert [pool[PREDICTION].max() for pool in pools] == [3, 4]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def run(pipe: StableDiffusionPipeline, **options: Any) -> tuple[Any, int]:
    output = pipe(PROMPT, **{**OPTIONS, **options})
    return output.images, output.timings.unet_evaluations


def error(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def exact(pipe: StableDiffusionPipeline) -> Any:
    latents, evaluations = run(pipe)
    assert evaluations == 8
    return latents


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "batch", "streams"])
def test_every_guidance_mode_gives_the_picture(
    pipe: StableDiffusionPipeline, exact: Any, mode: GuidanceMode
) -> None:
    latents, evaluations = run(pipe, guidance_mode=mode)
    assert evaluations == 8
    # 8-bit activations may round the other way where kernels for other shapes sum differently.
    assert error(latents, exact) < (1e-6 if mode == "sequential" else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_outside_the_interval_only_the_prompt_is_asked(
    pipe: StableDiffusionPipeline, exact: Any, mode: GuidanceMode
) -> None:
    latents, evaluations = run(pipe, guidance_mode=mode, guidance_interval=(0.25, 0.75))
    assert evaluations == 6
    assert 0.001 < error(latents, exact) < 0.5
    whole, evaluations = run(pipe, guidance_mode=mode, guidance_interval=(0.0, 1.0))
    assert evaluations == 8
    assert error(whole, exact) < 0.02


@pytest.mark.slow
def test_step_caching(pipe: StableDiffusionPipeline, exact: Any) -> None:
    cached, _ = run(pipe, speed=SpeedSettings(cache_interval=2))
    assert 1e-4 < error(cached, exact) < 0.5
    # A single step has nothing to use again.
    one = {"num_inference_steps": 1}
    exact_one, _ = run(pipe, **one)
    cached_one, _ = run(pipe, speed=SpeedSettings(cache_interval=3), **one)
    assert error(cached_one, exact_one) < 1e-6
    with pytest.raises(RequestError, match="skip connections"):
        run(pipe, speed=SpeedSettings(cache_interval=2, cache_branch=50))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_text_keys_made_apart_give_the_same_picture(exact: Any, mode: GuidanceMode) -> None:
    apart = StableDiffusionPipeline.from_pretrained(settings=RunSettings(default=IN_F32))
    apart.components.text_apart = True
    latents, _ = run(apart, guidance_mode=mode)
    assert error(latents, exact) < (1e-6 if mode == "sequential" else 0.02)
    assert {"unet.text"} < set(apart.components.parts)


@pytest.mark.slow
def test_fast_is_near(pipe: StableDiffusionPipeline) -> None:
    exact, _ = run(pipe, num_inference_steps=6)
    latents, evaluations = run(pipe, num_inference_steps=6, speed=FAST)
    assert evaluations == 11
    assert 1e-3 < error(latents, exact) < 0.6


def test_the_tiny_decoder_draws_about_the_same(pipe: StableDiffusionPipeline) -> None:
    full = run(pipe, output_type="np")[0]
    tiny = run(pipe, output_type="np", speed=SpeedSettings(tiny_vae=True))[0]
    assert tiny.shape == full.shape
    assert 0.0 < np.abs(full - tiny).mean() < 0.1
    pil = run(pipe, output_type="pil", speed=SpeedSettings(tiny_vae=True))[0][0]
    assert np.abs(np.asarray(pil) / 255 - tiny[0]).max() < 0.01


@pytest.mark.slow
def test_pieces_in_turn_give_the_same_picture() -> None:
    lean = StableDiffusionPipeline.from_pretrained(
        settings=RunSettings(default=IN_F32, low_memory=True)
    )
    latents, evaluations = run(lean, num_inference_steps=1)
    # Pieces run linear layers as products: they are packed at every step, and those sooner.
    settings = RunSettings(default=replace(IN_F32, linear_kernel="matmul"))
    plain, _ = run(
        StableDiffusionPipeline.from_pretrained(settings=settings), num_inference_steps=1
    )
    assert evaluations == 2
    assert error(latents, plain) < 1e-5
    parts = lean.components.parts
    assert not any(part.loaded for part in parts.values())
    kernels = {part.settings.linear_kernel for name, part in parts.items() if "unet." in name}
    assert kernels == {"matmul"}
    with pytest.raises(RequestError, match="caching"):
        run(lean, speed=SpeedSettings(cache_interval=2))


def test_a_picture_drawn_once_is_the_same_and_leaves_nothing_loaded(
    pipe: StableDiffusionPipeline,
) -> None:
    request = Request(prompts=(PROMPT,), num_inference_steps=1, seed=1)
    drawn = [
        [e for e in pipe.stream(request.resolve(pipe.folder), once=once) if hasattr(e, "pixels")]
        for once in (False, True)
    ]
    parts = pipe.components.parts
    assert not any(parts[name].loaded for name in ("text_encoder", "unet", "vae_decoder"))
    np.testing.assert_array_equal(drawn[0][0].pixels, drawn[1][0].pixels)
    many = replace(request, num_images_per_prompt=2).resolve(pipe.folder)
    assert not pipe.memory_plan(many, once=True).release_models


def test_a_limit_that_nothing_meets_is_refused() -> None:
    tight = StableDiffusionPipeline.from_pretrained(
        settings=RunSettings(default=IN_F32, max_memory=10**8)
    )
    with pytest.raises(RequestError, match="--max-memory"):
        run(tight)


@pytest.mark.slow
def test_pictures_decoded_aside_are_the_same(pipe: StableDiffusionPipeline) -> None:
    settings = RunSettings(default=replace(IN_F32, performance_hint="throughput"))
    many = StableDiffusionPipeline.from_pretrained(settings=settings)
    request = Request(
        prompts=(PROMPT,), num_images_per_prompt=3, num_inference_steps=1, seed=1
    ).resolve(pipe.folder)
    pictures = [e for e in many.stream(request) if isinstance(e, PictureEvent)]
    assert [picture.job.index for picture in pictures] == [0, 1, 2]
    expected = pipe.decode(np.concatenate([picture.latents for picture in pictures]))
    assert {part.settings.num_streams for part in many.components.parts.values()} == {1}
    for picture, plain in zip(pictures, expected, strict=True):
        assert picture.pixels is not None
        assert np.abs(picture.pixels.astype(int) - plain).max() <= 2


def test_plans() -> None:
    whole, pieces = MemoryPlan(), MemoryPlan(pieces=8)
    assert [p.batch for p in unet_plans(SpeedSettings(), whole, "sequential", guided=True)] == [1]
    assert [p.batch for p in unet_plans(SpeedSettings(), whole, "batch", guided=True)] == [2]
    assert [p.batch for p in unet_plans(SpeedSettings(), whole, "batch", guided=False)] == [1]
    assert [p.batch for p in unet_plans(FAST, whole, "batch", guided=True)] == [2, 1]
    assert unet_plans(SpeedSettings(), whole, "streams", guided=True)[0].streams == 2
    assert unet_plans(SpeedSettings(), pieces, "sequential", guided=True)[0].pieces == 8
    measured = RunSettings(guidance_mode="batch")
    assert guidance_mode(SpeedSettings(guidance_mode="streams"), measured) == "streams"
    assert guidance_mode(SpeedSettings(), measured) == "batch"
    devices = {
        "CPU": "sequential",
        "GPU.1": "batch",
        "HETERO:GPU,CPU": "batch",
        "AUTO": "sequential",
    }
    for device, mode in devices.items():
        settings = RunSettings(default=replace(IN_F32, device=device))
        assert guidance_mode(SpeedSettings(), settings) == mode


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance_interval": (0.5, 0.5)},
        {"guidance_interval": (-0.1, 0.5)},
        {"guidance_interval": (0.1, float("nan"))},
        {"token_downsampling": 3},
        {"cache_interval": 0},
        {"cache_branch": -1},
        {"guidance_mode": "both"},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SpeedSettings(**wrong)
