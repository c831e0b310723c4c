"""Wrong numbers: devices and precisions that lie, played by components that do."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from sdvino.errors import SdvinoError
from sdvino.runtime.component import Component
from sdvino.runtime.guard import CANARY_TOLERANCE, Guard, problem_of
from sdvino.runtime.profile import ProfileKey, ProfileMemory, ProfileStore
from sdvino.settings import DeviceSettings
from sdvino.weights.numbers import relative_error
from tests.runtime.test_component import INPUTS, expected, prepare
from tests.tiny_folder import make_tiny_folder

KEY = ProfileKey(machine="here", openvino="2026.4", model="ab" * 32)
RIGHT = expected(INPUTS["sample"], 250.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model") / "model")


class Clock:
    """Time passes when a component says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def guarding(folder: Path) -> Guard:
    return Guard(memory(folder), clock=CLOCK)


class Liar(Component):
    """A UNet that says it runs on a GPU under AUTO, and there does ``lie`` to its results."""

    lie = staticmethod(lambda out: out)
    #: Seconds that each run takes there, and on the CPU.
    slow = (0.0, 0.0)
    #: The arithmetic that lies; None: all.
    lying: str | None = None
    runs = 0

    @property
    def on_gpu(self) -> bool:
        return self.settings.device == "AUTO"

    @property
    def hardware(self) -> tuple[str, ...]:
        return ("GPU",) if self.on_gpu else ("CPU",)

    @property
    def precision(self) -> str | None:
        return "f16" if self.settings.precision is None and self.on_gpu else "f32"

    def twin(self, settings: DeviceSettings) -> Component:
        other = type(self)(self.name, self.xml_path, settings, prepare=self._prepare)
        other.lie, other.slow, other.lying = self.lie, self.slow, self.lying
        return other

    def _evaluate(
        self, inputs: Sequence[Mapping[str, Any]], together: bool
    ) -> list[Mapping[str, Any]]:
        self.runs += len(inputs)
        on_gpu = self.on_gpu
        CLOCK.now += self.slow[0 if on_gpu else 1] * len(inputs)
        return [self._told(outputs, on_gpu) for outputs in super()._evaluate(inputs, together)]

    def _told(self, outputs: Mapping[str, Any], on_gpu: bool) -> Mapping[str, Any]:
        if on_gpu and self.lying in (None, self.precision):
            outputs = {name: self.lie(out) for name, out in outputs.items()}
        if self.name == "vae_decoder":  # the result is called a decoded picture
            pixels = outputs["out_sample"].transpose(0, 2, 3, 1)[..., :3]
            outputs = {"pixels": np.clip(pixels, 0, 1)}
        return outputs


def liar(folder: Path, lie: Any, *, name: str = "unet", **fields: Any) -> Liar:
    component = Liar(
        name,
        folder / "unet" / "openvino_model.xml",
        DeviceSettings(device="AUTO"),
        prepare=prepare,
    )
    component.lie = lie
    for field, value in {"slow": (1.0, 3.0), **fields}.items():
        setattr(component, field, value)
    return component


def memory(tmp_path: Path) -> ProfileMemory:
    return ProfileMemory(ProfileStore(tmp_path), KEY, "tiny")


def nan(out: Any) -> Any:
    return np.full_like(out, np.nan)


def sentences(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_honest_device_is_checked_once_and_trusted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = liar(folder, lambda out: out * 1.001)
    unet.guard = guarding(tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(unet.infer(INPUTS)["out_sample"], RIGHT, rtol=1e-2, atol=1e-2)
    assert unet.settings.device == "AUTO"
    assert unet.runs == 3  # two asked for, and one that was timed
    assert sentences(caplog) == []
    again = liar(folder, lambda out: out * 1.001)
    again.guard = guarding(tmp_path)
    again.infer(INPUTS)
    assert again.runs == 1  # remembered
    kept = memory(tmp_path).profile.trusted["unet on AUTO"]
    assert kept == "error 1.0e-03, 3.0 x the CPU"


@pytest.mark.parametrize(
    ("lie", "fields", "words"),
    [
        (lambda out: out * 3.0, {}, r"its results are off by 200%"),
        (lambda out: np.zeros_like(out), {}, r"its results are off by 100%"),
        (
            lambda out: out,
            {"slow": (3.0, 1.0)},
            r"took 3\.00 s an evaluation where the CPU takes 1\.00 s",
        ),
    ],
)
def test_a_device_that_is_wrong_or_slow_is_left_for_the_cpu(
    lie: Any,
    fields: dict[str, Any],
    words: str,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    unet = liar(folder, lie, **fields)
    unet.guard = guarding(tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(unet.infer(INPUTS)["out_sample"], RIGHT, rtol=1e-3, atol=1e-3)
    assert unet.settings.device == "CPU"
    (said,) = sentences(caplog)
    assert said.startswith("The UNet ran on AUTO in f16 and ")
    assert re.search(words, said)
    assert said.endswith("it runs on CPU in f32 from now on.")
    # The next process asks nothing and goes to the CPU at once.
    caplog.clear()
    guard = guarding(tmp_path)
    settings = guard.settings("unet", DeviceSettings(device="auto", num_threads=1))
    assert (settings.device, settings.num_threads) == ("CPU", 1)
    guard.settings("unet", DeviceSettings(device="AUTO"))
    (said,) = sentences(caplog)
    assert "on AUTO in f16" in said
    assert "--no-profile" in said
    assert guard.settings("unet", DeviceSettings(device="GPU.1")).device == "GPU.1"
    assert Guard().settings("unet", DeviceSettings(device="AUTO")).device == "AUTO"


def test_nan_in_f16_is_computed_again_in_f32(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = liar(folder, nan, lying="f16")
    unet.guard = guarding(tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(unet.infer(INPUTS)["out_sample"], RIGHT, rtol=1e-3, atol=1e-3)
    assert (unet.settings.device, unet.settings.precision) == ("AUTO", "f32")
    (said,) = sentences(caplog)
    assert said == (
        "The UNet ran on AUTO in f16 and gave values that are not numbers;"
        " it runs on AUTO in f32 from now on."
    )
    guard = guarding(tmp_path)
    assert guard.settings("unet", DeviceSettings(device="AUTO")).precision == "f32"
    # A precision that was asked for is tried again.
    asked = DeviceSettings(device="AUTO", precision="f16")
    assert guard.settings("unet", asked) == asked


def test_nan_in_f32_on_a_gpu_goes_to_the_cpu(folder: Path, tmp_path: Path) -> None:
    encoder = liar(folder, nan, name="text_encoder")
    encoder.change(DeviceSettings(device="AUTO", precision="f32"))
    encoder.guard = guarding(tmp_path)
    np.testing.assert_allclose(encoder.infer(INPUTS)["out_sample"], RIGHT, rtol=1e-3, atol=1e-3)
    assert encoder.settings.device == "CPU"


def test_nan_on_the_cpu_in_f32_is_an_error_and_not_remembered(folder: Path, tmp_path: Path) -> None:
    xml = folder / "unet" / "openvino_model.xml"
    unet = Component("unet", xml, DeviceSettings(precision="f32"), prepare=prepare)
    unet.guard = guarding(tmp_path)
    wide = {**INPUTS, "sample": np.copysign(np.float32(3.4e38), INPUTS["sample"])}
    with pytest.raises(SdvinoError, match="UNet gave values that are not numbers, in full"):
        unet.infer(wide)
    assert memory(tmp_path).profile.fallbacks == {}
    # What was not a number before is nobody's fault here.
    unet.infer({**INPUTS, "sample": np.full_like(INPUTS["sample"], np.nan)})


def test_a_picture_of_one_colour_is_computed_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vae = liar(folder, lambda out: out * 0, name="vae_decoder", lying="f16")
    vae.guard = guarding(tmp_path)
    assert np.ptp(vae.infer(INPUTS)["pixels"]) > 0.1
    assert vae.settings.precision == "f32"
    (said,) = sentences(caplog)
    assert "VAE decoder" in said
    assert "a picture of one colour" in said


def test_a_picture_that_is_of_one_colour_stays_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vae = liar(folder, lambda out: out * 0, name="vae_decoder")
    vae.guard = guarding(tmp_path)
    for _ in range(2):
        assert not vae.infer(INPUTS)["pixels"].any()
    assert sentences(caplog) == []
    assert memory(tmp_path).profile.fallbacks == {}
    assert vae.runs == 3  # one look in f32, and no more


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ({"x": np.ones(3, np.float32)}, None),
        ({"x": np.array([1, np.inf], np.float32)}, "not numbers"),
        ({"pixels": np.zeros((1, 2, 2, 3), np.uint8), "finite": np.array([False])}, "not numbers"),
        ({"pixels": np.full((1, 4, 4, 3), 7, np.uint8)}, "one colour"),
        ({"pixels": np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)}, None),
        ({"pixels": np.full((1, 4, 4, 3), 0.5, np.float32)}, "one colour"),
        # One channel that varies is a picture.
        ({"pixels": np.stack([np.eye(4), np.eye(4) * 0, np.eye(4) * 0], 2)[None]}, None),
    ],
)
def test_problems(outputs: dict[str, Any], problem: str | None) -> None:
    found = problem_of("vae_decoder", outputs)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


def test_only_decoded_pictures_may_not_be_flat() -> None:
    assert problem_of("tiny_vae", {"pixels": np.full((1, 4, 4, 3), 7, np.uint8)}) is None


def test_relative_errors() -> None:
    ones = np.ones(4, np.float32)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones * np.nan, ones) == float("inf")
    assert relative_error(ones * 0, ones * 0) == 0.0
    assert relative_error(ones, ones * 0) == float("inf")
    half = np.float16(1e-3) * np.random.default_rng(0).standard_normal(4).astype(np.float32)
    assert relative_error(ones + half, ones) < CANARY_TOLERANCE


def test_two_threads_get_right_numbers_while_a_device_is_found_out(
    folder: Path, tmp_path: Path
) -> None:
    unet = liar(folder, lambda out: out * 3.0)
    unet.guard = guarding(tmp_path)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(unet.infer(INPUTS)["out_sample"].copy()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        np.testing.assert_allclose(result, RIGHT, rtol=1e-3, atol=1e-3)


def test_another_graph_of_the_same_part_follows(folder: Path, tmp_path: Path) -> None:
    guard = guarding(tmp_path)
    first, second = (liar(folder, lambda out: out * 3.0) for _ in range(2))
    for unet in (second, first, second):
        unet.guard = guard
        out = unet.infer(INPUTS)["out_sample"]
        np.testing.assert_allclose(out, RIGHT, rtol=1e-3, atol=1e-3)
        assert unet.settings.device == "CPU"
    assert first.runs == 2  # found in the wrong place, and moved: no comparison of its own


@pytest.mark.gpu
def test_a_real_gpu_agrees_or_is_left(folder: Path, tmp_path: Path) -> None:
    if not any(name.startswith("GPU") for name in ov.Core().available_devices):
        pytest.skip("OpenVINO finds no GPU here")
    xml = folder / "unet" / "openvino_model.xml"
    unet = Component("unet", xml, DeviceSettings(device="GPU"), prepare=prepare)
    unet.guard = guarding(tmp_path)
    out = unet.infer(INPUTS)["out_sample"]
    np.testing.assert_allclose(out, RIGHT, rtol=2e-2, atol=2e-2)
    kept = memory(tmp_path).profile
    assert ("unet on GPU" in kept.trusted) != ("unet" in kept.fallbacks)


def test_one_pixel_that_differs_is_no_flat_picture() -> None:
    pixels = np.full((1, 128, 128, 3), 90, np.uint8)
    assert problem_of("vae_decoder", {"pixels": pixels}) is not None
    pixels[0, 77, 33, 1] = 92  # between the few that are looked at first
    assert problem_of("vae_decoder", {"pixels": pixels}) is None
