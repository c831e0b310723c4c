"""Calibration of every family: what the runtime feeds its UNet, on graphs of a few nodes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from sdvino.compress.calibration import CalibrationInputs, CalibrationPlan
from sdvino.compress.float_pipeline import FloatPipeline
from sdvino.compress.folder import calibrate
from sdvino.compress.statistics import Statistics
from sdvino.folder.index import ModelFolder
from sdvino.image.tiling import TILE
from sdvino.text.conditions import embed_guidance_scale
from tests.text.folders import write_legacy
from tests.tiny_folder import (
    POOLED,
    edit_json,
    make_tiny_folder,
    make_tiny_lcm_folder,
    make_tiny_xl_folder,
    save,
    trained_unet,
)

PROMPTS = ("red circle", "blue", "a circle on red", "on blue")


def plan(**changes: Any) -> CalibrationPlan:
    given: dict[str, Any] = {"strata": 2, "guidance_scale": 5.0, "shape": (4, 16, 16), **changes}
    return CalibrationPlan(prompts=PROMPTS, unet_samples=1000, **given)


def finish_folder(folder: Path) -> Path:
    for tokenizer in folder.glob("tokenizer*"):
        shutil.rmtree(tokenizer)
        write_legacy(tokenizer)
    return folder


def make_xl(base: Path) -> Path:
    folder = make_tiny_xl_folder(base / "xl")
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    config = dict(ModelFolder.open(folder).components["unet"].config)
    save(trained_unet({"text_embeds": POOLED, "time_ids": 6}), folder / "unet", config)
    return finish_folder(folder)


def fits_the_saved_ir(folder: Path, inputs: CalibrationInputs) -> None:
    """Every input can be given to the IR that is quantized, by name, type and shape."""
    model = ov.Core().read_model(folder / "unet" / "openvino_model.xml")
    types = {port.get_any_name(): port.get_element_type().to_dtype() for port in model.inputs}
    run = ov.Core().compile_model(model, "CPU")
    for sample in inputs.unet:
        assert {name: array.dtype for name, array in sample.items()} == types
        assert np.isfinite(run(sample)[0]).all()


def test_sdxl_is_told_sizes_and_pooled_text(tmp_path: Path) -> None:
    folder = make_xl(tmp_path)
    inputs = calibrate(folder, plan(shape=(4, 16, 24)))
    fits_the_saved_ir(folder, inputs)
    assert len(inputs.unet) == len(PROMPTS) * 3 * 2
    for sample in inputs.unet:
        np.testing.assert_array_equal(sample["time_ids"], [[128, 192, 0, 0, 128, 192]])
    # Half are without the prompt; half of those away from zeros, half from an empty text.
    empty = [sample for sample in inputs.unet if not sample["encoder_hidden_states"].any()]
    assert len(empty) == len(inputs.unet) // 4
    assert not any(sample["text_embeds"].any() for sample in empty)
    pooled = {sample["text_embeds"].tobytes() for sample in inputs.unet}
    assert len(pooled) == len(PROMPTS) + 2


def test_an_lcm_is_told_its_guidance_and_asked_once(tmp_path: Path) -> None:
    folder = finish_folder(make_tiny_lcm_folder(tmp_path / "lcm"))
    few = plan(few_steps=(4, 2), sampler="lcm", guidance_scale=8.5, embedded_guidance=True)
    inputs = calibrate(folder, few)
    fits_the_saved_ir(folder, inputs)
    assert len(inputs.unet) == few.evaluations == 2 * (4 + 2)
    for sample in inputs.unet:
        np.testing.assert_array_equal(sample["timestep_cond"], embed_guidance_scale(8.5, 16))
    assert {int(sample["timestep"][0]) for sample in inputs.unet[:4]} == {999, 759, 499, 259}


@pytest.mark.parametrize("make", [make_tiny_folder, make_tiny_xl_folder])
def test_v_prediction_stays_finite(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """The folders' UNets are said to predict v; with zero terminal SNR the first x is noise."""
    folder = finish_folder(make(tmp_path / "model"))
    edit_json(
        folder / "scheduler" / "scheduler_config.json",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    inputs = calibrate(folder, plan())
    fits_the_saved_ir(folder, inputs)
    deviations = [float(np.std(sample["sample"])) for sample in inputs.unet]
    assert 0.5 < deviations[0] < 2.0


def test_turbo_runs_without_guidance_on_its_own_grid(tmp_path: Path) -> None:
    folder = finish_folder(make_tiny_folder(tmp_path / "model"))
    edit_json(
        folder / "scheduler" / "scheduler_config.json",
        _class_name="EulerDiscreteScheduler",
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )
    inputs = calibrate(folder, plan(few_steps=(4,), guidance_scale=1.0))
    times = [int(sample["timestep"][0]) for sample in inputs.unet]
    assert times == [999, 749, 499, 249] * len(PROMPTS)


def test_the_decoder_is_given_what_the_runtime_gives_it(tmp_path: Path) -> None:
    """The saved decoder takes unscaled latents and gives -1 to 1; large latents go in tiles."""
    folder = finish_folder(make_tiny_folder(tmp_path / "model"))
    pipeline = FloatPipeline(folder, plan(shape=(4, TILE + 16, TILE)))
    latents = np.random.default_rng(0).standard_normal((1, 4, TILE + 16, TILE), dtype=np.float32)
    path = folder / "vae_decoder" / "openvino_model.xml"
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would compute in bf16
    decoder = ov.Core().compile_model(path, "CPU", exact)
    starts = set()
    for index in range(5):
        fed, picture = pipeline.decode(latents, index)
        assert fed.shape == (1, 4, TILE, TILE)
        start = next(
            y
            for y in range(17)
            if np.allclose(fed * np.float32(0.18215), latents[:, :, y : y + TILE], atol=1e-5)
        )
        starts.add(start)
        expected = decoder({"latent_sample": fed})[0]
        np.testing.assert_allclose(picture, expected, atol=1e-4)
    assert starts == {0, 8, 16}


def test_what_draws_the_pictures_tells_its_statistics(tmp_path: Path) -> None:
    """All evaluations count, or as many as the plan says; the autoencoder's are its pictures'."""
    folder = finish_folder(make_tiny_folder(tmp_path / "model"))
    components = ("unet", "vae_decoder")
    for measured in (None, 5):
        made = replace(plan(), measured=measured)
        files = {name: tmp_path / f"{name}-{measured}.bin" for name in components}
        inputs = calibrate(folder, made, measured=files)
        found = {name: Statistics(file) for name, file in files.items()}
        assert found["unet"].evaluations == (made.evaluations if measured is None else measured)
        assert found["vae_decoder"].evaluations == len(PROMPTS)
        for name, samples, value in (
            ("unet", inputs.unet, "sample"),
            ("vae_decoder", inputs.vae_decoder, "latent_sample"),
        ):
            channels = found[name].find((value, 0))
            assert channels is not None
            highest = sorted(float(sample[value].max()) for sample in samples)
            if name == "unet" and measured is not None:
                assert set(channels.high.max(axis=1)) < {np.float32(each) for each in highest}
            else:
                assert sorted(channels.high.max(axis=1)) == pytest.approx(highest)
