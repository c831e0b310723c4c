"""`sdvino tune` on the bundled demo model, and a pipeline that is watched over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

import sdvino.runtime.components
from sdvino import RequestError, RunSettings, StableDiffusionPipeline
from sdvino.cli.main import main
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.runtime import profile
from sdvino.runtime.component import Component
from sdvino.runtime.profile import Fallback, ProfileStore, profile_key
from sdvino.settings import DeviceSettings, GuidanceMode
from sdvino.tuning.axes import Choice
from sdvino.tuning.chart import draw_trials
from sdvino.tuning.search import Candidate, Trial
from sdvino.tuning.tune import Workbench, still_valid, tune
from tests.conftest import SHAPES
from tests.tiny_folder import make_tiny_folder

PROMPT = "a big red circle on a blue background"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "height": 64, "width": 64}
IN_F32 = RunSettings(default=DeviceSettings(precision="f32"))


@pytest.fixture(autouse=True)
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that these tests learn is for the others."""
    monkeypatch.setattr(profile, "default_cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def right() -> Any:
    """The picture that every way to run makes."""
    pipe = StableDiffusionPipeline.from_pretrained(profile=False)
    return np.asarray(pipe(PROMPT, **OPTIONS).images[0]).astype(int)


@pytest.fixture(scope="module")
def right_in_f32() -> Any:
    """The picture without bf16, which some processors have beside 8 bits."""
    pipe = StableDiffusionPipeline.from_pretrained(settings=IN_F32, profile=False)
    return np.asarray(pipe(PROMPT, **OPTIONS).images[0]).astype(int)


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.open(SHAPES)


@pytest.mark.slow
def test_a_real_run_in_seconds_then_a_picture_with_its_profile(
    tmp_path: Path,
    folder: ModelFolder,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plot = tmp_path / "tried.png"
    small = ["-W", "64", "-H", "64"]
    assert main(["tune", *small, "--minutes", "0.1", "--plot", str(plot)]) == 0
    shown = capfd.readouterr()
    assert "unet: " in shown.out
    assert str(plot) in shown.out
    assert "left)" in shown.err
    with Image.open(plot) as picture:
        assert picture.size[0] == 960
    kept = ProfileStore().read(profile_key(folder))
    assert (kept.width, kept.height) == (64, 64)
    assert kept.components["unet"].settings["precision"] in ("f32", "bf16")
    assert kept.components["unet"].seconds > 0
    assert main(["devices"]) == 0
    assert f"{folder.name}: tuned on {kept.tuned} for 64 x 64" in capfd.readouterr().out

    draw = ["generate", PROMPT, "-o", str(tmp_path / "a.png"), "--steps", "1", *small, "-q"]
    assert main(draw) == 0
    assert caplog.text.count("Using the profile") == 1
    caplog.clear()
    assert main([*draw, "--no-profile"]) == 0
    assert caplog.text == ""


def test_ctrl_c_before_anything_was_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workbench, "_load", stop)
    assert main(["tune", "--minutes", "1", "-q"]) == 130
    assert "no profile was written" in capfd.readouterr().err
    assert ProfileStore().all() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["-W", "100"], "multiple of"),
        (["-H", "0"], "multiple of"),
        (["--device", "TPU"], "TPU"),
        (["--device", "AUTO"], "AUTO is no hardware"),
        (["-m", "/no/such/folder"], "no/such/folder"),
        (["--plot", "tried.txt"], ".txt"),
    ],
)
def test_wrong_requests(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    assert words in capfd.readouterr().err


def test_without_time_nothing_is_claimed(folder: ModelFolder) -> None:
    found = tune(folder, seconds=0.0)
    assert not found.components
    assert not found.complete


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    workbench = Workbench(ModelFolder.open(make_tiny_folder(tmp_path / "model")), (8, 8))
    yield workbench
    workbench.close()


def test_a_precision_that_gives_other_numbers_is_no_candidate(bench: Workbench) -> None:
    measure = bench.measure("unet")
    assert measure(Choice(DeviceSettings(num_threads=1))) > 0
    bench._references["unet"]["out_sample"] *= 2
    with pytest.raises(SdvinoError, match="its results are off by 50%"):
        measure(Choice(DeviceSettings(num_threads=1, pinning=False)))


def test_every_part_and_every_way_to_guide_can_be_measured(bench: Workbench) -> None:
    for mode in get_args(GuidanceMode):
        assert bench.measure("unet")(Choice(DeviceSettings(), mode)) > 0
    for name in ("vae_decoder", "text_encoder"):
        assert bench.measure(name)(Choice(DeviceSettings())) > 0


def trial(label: str, *seconds: float, **fields: Any) -> Trial[Choice]:
    choice = Choice(DeviceSettings())
    return Trial(axis="cores", candidate=Candidate(label, choice), seconds=seconds, **fields)


def test_the_chart_s_bars_are_as_long_as_their_seconds() -> None:
    trials = [
        trial("a" * 200, 2.0, 2.2, chosen=True),
        trial("b", 4.0),
        trial("c", problem="no such thing here"),
    ]
    pixels = np.asarray(draw_trials({"unet": trials}, "what was tried"))

    def longest(colour: tuple[int, int, int]) -> int:
        return int(np.all(pixels == colour, axis=-1).sum(axis=1).max())

    chosen, tried = longest((0x2F, 0x6F, 0xB0)), longest((0x9D, 0xB4, 0xCF))
    assert chosen > 100
    assert abs(tried - 2 * chosen) <= 2
    assert draw_trials({}, "nothing").size[0] == pixels.shape[1]


def test_tuning_asks_a_device_anew_and_a_precision_not() -> None:
    slow = Fallback(
        from_device="GPU", from_precision="f16", device="CPU", precision="f32", why="it was slow"
    )
    overflowed = replace(slow, device="GPU")
    gpu = Choice(DeviceSettings(device="GPU"))
    tried = Trial(axis="device", candidate=Candidate("GPU", gpu), seconds=(1.0,))
    before = {"unet": slow, "vae_decoder": overflowed, "text_encoder": slow}
    left = still_valid(before, {"unet": [tried], "vae_decoder": [tried]})
    assert set(left) == {"vae_decoder", "text_encoder"}
    wrong = replace(tried, seconds=(), problem="its results are off by 300%")
    assert still_valid({"unet": slow}, {"unet": [wrong]}) == {"unet": slow}


class Overflows(Component):
    """Its float results are not numbers until it is asked for f32."""

    def _evaluate(
        self, inputs: Sequence[Mapping[str, Any]], together: bool
    ) -> list[Mapping[str, Any]]:
        results = super()._evaluate(inputs, together)
        if self.settings.precision == "f32":
            return results
        return [
            {**outputs, "finite": np.array([False])}
            if "finite" in outputs
            else {name: np.full_like(out, np.nan) for name, out in outputs.items()}
            for outputs in results
        ]

    @property
    def precision(self) -> str | None:
        return "bf16" if self.settings.precision is None else self.settings.precision


@pytest.mark.slow
def test_a_pipeline_whose_arithmetic_overflows_makes_the_right_picture(
    right_in_f32: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sdvino.runtime.components, "Component", Overflows)
    pipe = StableDiffusionPipeline.from_pretrained()
    assert np.array_equal(np.asarray(pipe(PROMPT, **OPTIONS).images[0]), right_in_f32)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" ran ")[0] for line in said] == [
        "The text encoder",
        "The UNet",
        "The VAE decoder",
    ]
    assert all("in bf16" in line and "in f32 from now on" in line for line in said)
    # The next pipeline starts in f32, and says that it does.
    caplog.clear()
    again = StableDiffusionPipeline.from_pretrained()
    assert again.components.unet(8, 8).settings.precision == "f32"
    assert "on CPU in bf16 it gave values" in caplog.text
    assert "--no-profile" in caplog.text
    # Without a profile nothing is remembered.
    fresh = StableDiffusionPipeline.from_pretrained(profile=False)
    assert fresh.components.unet(8, 8).settings.precision is None


@pytest.mark.slow
def test_virtual_devices_and_streams_make_the_same_picture(right: Any) -> None:
    settings = RunSettings(
        components={
            "text_encoder": DeviceSettings(device="AUTO"),
            "unet": DeviceSettings(num_streams=2),
            "vae": DeviceSettings(device="HETERO:CPU"),
        }
    )
    pipe = StableDiffusionPipeline.from_pretrained(settings=settings)
    found = np.asarray(pipe(PROMPT, **OPTIONS).images[0]).astype(int)
    assert np.abs(found - right).max() <= 2


@pytest.mark.gpu
def test_a_real_gpu_makes_a_picture() -> None:
    import openvino as ov

    if not any(name.startswith("GPU") for name in ov.Core().available_devices):
        pytest.skip("OpenVINO finds no GPU here")
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3}
    right = StableDiffusionPipeline.from_pretrained(device="CPU")(PROMPT, **options).images[0]
    found = StableDiffusionPipeline.from_pretrained(device="GPU")(PROMPT, **options).images[0]
    assert np.abs(np.asarray(found, int) - np.asarray(right, int)).mean() < 8


def test_devices_say_their_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    shown = capfd.readouterr().out
    assert "default threads: " in shown
    assert "default arithmetic: f32 (" in shown or "default arithmetic: bf16 (" in shown
    assert "no profile for this machine" in shown


def test_a_request_error_is_no_crash() -> None:
    with pytest.raises(RequestError):
        tune(ModelFolder.open(SHAPES), seconds=1.0, width=7)
