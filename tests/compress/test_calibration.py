from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sdvino.compress.calibration import (
    CalibrationInputs,
    CalibrationPlan,
    collect,
    make_plan,
    split_prediction,
    timestep_grid,
)
from sdvino.compress.recipes import CalibrationRecipe
from sdvino.compress.samples import load_samples
from sdvino.errors import SdvinoError

Array = NDArray[np.float32]
T = 1000


def plan(**changes: Any) -> CalibrationPlan:
    base = CalibrationPlan(prompts=("a", "b", "c", "d"), shape=(4, 8, 8), unet_samples=1000)
    return dataclasses.replace(base, **changes)


class PerfectModel:
    """Predicts exactly, for one picture of its own: every trajectory must end at it."""

    def __init__(self, prediction_type: str) -> None:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.prediction_type = prediction_type
        self.picture = np.random.default_rng(5).standard_normal((1, 4, 8, 8)).astype(np.float32)
        self.timesteps: list[int] = []

    def encode(self, prompt: str) -> dict[str, Array]:
        return {"encoder_hidden_states": np.full((1, 77, 2), len(prompt), dtype=np.float32)}

    def predict(self, sample: Array, timestep: int, conditions: Mapping[str, Array]) -> Array:
        self.timesteps.append(timestep)
        alpha = np.float32(self.alphas_cumprod[timestep] ** 0.5)
        sigma = np.float32((1 - self.alphas_cumprod[timestep]) ** 0.5)
        epsilon = (sample - alpha * self.picture) / sigma
        predictions: dict[str, Array] = {
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * self.picture,
            "sample": self.picture,
        }
        return predictions[self.prediction_type]

    def decode(self, latents: Array) -> tuple[Array, Array]:
        return latents / np.float32(0.5), 3 * latents[:, :3]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_is_denoised_to_its_picture(prediction_type: str) -> None:
    model = PerfectModel(prediction_type)
    inputs = collect(model, plan(), lambda share: None)
    assert len(inputs.vae_decoder) == 4
    for fed, tiny, image in zip(
        inputs.vae_decoder, inputs.tiny_vae, inputs.vae_encoder, strict=True
    ):
        np.testing.assert_allclose(tiny["latent_sample"], model.picture, atol=2e-4)
        np.testing.assert_allclose(fed["latent_sample"], 2 * model.picture, atol=4e-4)
        assert np.abs(image["sample"]).max() == 1.0  # clipped to what pictures are


def test_both_branches_of_guidance_and_every_stratum_are_kept() -> None:
    inputs = collect(PerfectModel("v_prediction"), plan(), lambda share: None)
    assert len(inputs.unet) == plan().evaluations
    texts = [float(sample["encoder_hidden_states"][0, 0, 0]) for sample in inputs.unet]
    assert texts.count(0.0) == texts.count(1.0) == len(texts) // 2
    strata = {int(sample["timestep"][0]) * plan().strata // T for sample in inputs.unet}
    assert strata == set(range(plan().strata))
    assert all(sample["timestep"].dtype == np.int64 for sample in inputs.unet)


def test_without_guidance_nothing_runs_unconditionally() -> None:
    inputs = collect(PerfectModel("epsilon"), plan(guidance_scale=1.0), lambda share: None)
    assert {float(s["encoder_hidden_states"][0, 0, 0]) for s in inputs.unet} == {1.0}


def test_the_same_plan_keeps_the_same_inputs() -> None:
    few = plan(unet_samples=10)
    first, second = (
        collect(PerfectModel("epsilon"), few, lambda share: None).unet for _ in range(2)
    )
    assert len(first) == 10
    for one, other in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_progress_rises_to_the_end() -> None:
    shares: list[float] = []
    collect(PerfectModel("epsilon"), plan(), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_model_that_gives_no_numbers_is_named() -> None:
    model = PerfectModel("epsilon")
    model.picture[...] = np.nan
    with pytest.raises(SdvinoError, match="int8-weights"):
        collect(model, plan(), lambda share: None)


def test_inputs_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    inputs = collect(PerfectModel("epsilon"), plan(unet_samples=12), lambda share: None)
    inputs.save(tmp_path / "calibration")
    loaded = CalibrationInputs.load(tmp_path / "calibration")
    for component in ("unet", "vae_decoder", "vae_encoder", "tiny_vae"):
        assert len(loaded.of(component)) == len(inputs.of(component))
        for one, other in zip(loaded.of(component), inputs.of(component), strict=True):
            assert {name: array.dtype for name, array in one.items()} == {
                name: array.dtype for name, array in other.items()
            }
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    assert loaded.of("text_encoder") == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_damaged_inputs_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "unet.npz").write_bytes(content)
    with pytest.raises(SdvinoError, match=r"unet\.npz"):
        load_samples(tmp_path / "unet.npz")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    with (tmp_path / "unet.npz").open("wb") as file:
        arrays: dict[str, Any] = {"0/sample": np.array([{}], dtype=object)}
        np.savez(file, **arrays)
    with pytest.raises(SdvinoError, match=r"unet\.npz"):
        load_samples(tmp_path / "unet.npz")


def test_plans_follow_the_recipe_and_the_size_of_the_unet() -> None:
    texts = [f"prompt {number}" for number in range(96)]

    def made(unet_bytes: int, **recipe: Any) -> CalibrationPlan:
        return make_plan(
            CalibrationRecipe(**recipe),
            texts,
            unet_bytes=unet_bytes,
            guidance_scale=7.5,
            shape=(4, 64, 64),
        )

    small, large = made(10**7), made(2 * 10**9)
    assert len(small.prompts) == 48
    assert len(set(large.prompts)) == 12
    assert large.evaluations < small.evaluations
    assert large.unet_samples <= large.evaluations
    assert {small.prompts[0], large.prompts[0]} == {"prompt 0"}
    mine = made(10**7, prompts=("a", "b"), strata=3, samples=5, seed=9, trajectories=1)
    assert (mine.prompts, mine.strata, mine.unet_samples, mine.seed) == (("a",), 3, 5, 9)


def test_an_unknown_prediction_type_is_named() -> None:
    x = np.zeros((1, 4, 8, 8), dtype=np.float32)
    with pytest.raises(SdvinoError, match="flow"):
        split_prediction("flow", x, x, np.float32(0.5), np.float32(0.5))


@given(
    trajectories=st.integers(1, 300), strata=st.integers(1, 50), steps=st.sampled_from([100, 1000])
)
def test_grids_fall_from_the_last_timestep_and_leave_no_stratum_out(
    trajectories: int, strata: int, steps: int
) -> None:
    p = plan(prompts=("x",) * trajectories, strata=strata)
    for index in {0, trajectories // 2, trajectories - 1}:
        grid = timestep_grid(p, index, steps)
        assert grid[0] == steps - 1
        assert grid[-1] >= 0
        gaps = [a - b for a, b in itertools.pairwise([*grid, 0])]
        assert min(gaps[:-1], default=1) > 0
        assert max(gaps) <= steps / strata + 1
