"""The UNet is loaded while texts are read, where memory allows."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdvino import DeviceError, StableDiffusionPipeline
from sdvino.runtime.component import Component
from sdvino.runtime.components import Components
from sdvino.settings import SpeedSettings
from sdvino.text.conditions import Conditioner

PROMPT = "a small blue star on a white background"


def pipeline(monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> StableDiffusionPipeline:
    """Return a pipeline that has loaded nothing, whose memory plans load ahead or do not."""
    pipe = StableDiffusionPipeline.from_pretrained()
    plan = pipe.memory_plan

    def planned(*arguments: Any, **options: Any) -> Any:
        return replace(plan(*arguments, **options), load_ahead=ahead)

    monkeypatch.setattr(pipe, "memory_plan", planned)
    return pipe


def drawn(pipe: StableDiffusionPipeline, **options: Any) -> Any:
    return pipe(PROMPT, seed=4, num_inference_steps=2, output_type="latent", **options).images


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sdvino-load")]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 1.0}, {"speed": SpeedSettings(cache_interval=2)}]
)
def test_it_is_loaded_in_a_thread_and_draws_the_same(
    options: dict[str, Any], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {}
    compile_one = Component._compile

    def noted(self: Component) -> Any:
        aside = threading.current_thread() is not threading.main_thread()
        seen.setdefault(self.name, set()).add(aside)
        return compile_one(self)

    expected = drawn(pipeline(monkeypatch, ahead=False), **options)
    monkeypatch.setattr(Component, "_compile", noted)
    np.testing.assert_array_equal(drawn(pipeline(monkeypatch, ahead=ahead), **options), expected)
    assert seen["unet"] == {ahead}
    assert seen["text_encoder"] == {False}
    assert not loading()


def test_what_goes_wrong_there_is_said_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(monkeypatch, ahead=True)
    with monkeypatch.context() as patched:

        def fail(self: Components, *arguments: Any) -> Any:
            raise DeviceError("no such kernel")

        patched.setattr(Components, "unets", fail)
        with pytest.raises(DeviceError, match="no such kernel"):
            drawn(pipe)
    assert not loading()
    assert drawn(pipe).shape[0] == 1


def test_a_prompt_that_cannot_be_read_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(monkeypatch, ahead=True)
    with monkeypatch.context() as patched:

        def fail(self: Conditioner, *arguments: Any) -> Any:
            raise ValueError("no words")

        patched.setattr(Conditioner, "unet_inputs", fail)
        with pytest.raises(ValueError, match="no words"):
            drawn(pipe)
    assert not loading()
