from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sdvino.compress.calibration import (
    CalibrationPlan,
    collect,
    load_samples,
    make_plan,
    save_samples,
    timestep_grid,
    trajectory_grid,
)
from sdvino.compress.recipes import CalibrationRecipe
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.schedule import train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import SdvinoError
from sdvino.settings import SamplerName

Array = NDArray[np.float32]
T = 1000


SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


PICTURE = np.random.default_rng(5).standard_normal((1, 4, 8, 8)).astype(np.float32)


def plan(**changes: Any) -> CalibrationPlan:
    base = CalibrationPlan(prompts=("a", "b", "c", "d"), shape=(4, 8, 8), unet_samples=1000)
    return dataclasses.replace(base, **changes)


class PerfectModel:
    """Predicts exactly, for one picture of its own: every trajectory must end at it."""

    def __init__(
        self, prediction_type: str, *, added: bool = False, embedded: bool = False
    ) -> None:
        config = {**SCHEDULER, "prediction_type": prediction_type}
        self.scheduler = SchedulerConfig.from_dict(config)
        self.alphas = train_alphas_cumprod(self.scheduler.for_sampler("euler"), keep_zero=False)
        self.picture = PICTURE.copy()
        self.added, self.embedded = added, embedded
        self.calls: list[str] = []

    def conditions(self, prompt: str, negative: str | None) -> Any:
        self.calls.append("conditions")
        told = self._told(float(len(prompt)))
        if self.embedded:
            return {**told, "timestep_cond": np.full((1, 4), 0.5, np.float32)}, None
        return told, self._told(-1.0 if negative is None else float(len(negative)))

    def _told(self, value: float) -> dict[str, Array]:
        hidden = {"encoder_hidden_states": np.full((1, 77, 2), value, np.float32)}
        more = {
            "text_embeds": np.full((1, 3), value, np.float32),
            "time_ids": np.ones((1, 6), "f4"),
        }
        return hidden | more if self.added else hidden

    def predict(self, inputs: Sequence[Mapping[str, Array]]) -> list[Array]:
        self.calls.append("predict")
        return list(map(self._predict, inputs))

    def _predict(self, inputs: Mapping[str, Array]) -> Array:
        sample, timestep = inputs["sample"], inputs["timestep"]
        assert timestep.dtype == np.float32
        product = np.interp(timestep[0], np.arange(T), self.alphas)
        alpha, sigma = np.float32(product**0.5), np.float32((1 - product) ** 0.5)
        epsilon = (sample - alpha * self.picture) / sigma
        predictions: dict[str, Array] = {
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * self.picture,
            "sample": self.picture,
        }
        return predictions[self.scheduler.given["prediction_type"]]

    def decode(self, latents: Array, index: int) -> tuple[Array, Array]:
        self.calls.append("decode")
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
    assert texts.count(1.0) == len(texts) // 2
    # Without the prompt: an empty one, and none, by turns.
    assert texts.count(0.0) == texts.count(-1.0) == len(texts) // 4
    strata = {int(sample["timestep"][0]) * plan().strata // T for sample in inputs.unet}
    assert strata == set(range(plan().strata))
    assert all(sample["timestep"].dtype == np.int64 for sample in inputs.unet)


def test_without_guidance_nothing_runs_unconditionally() -> None:
    inputs = collect(PerfectModel("epsilon"), plan(guidance_scale=1.0), lambda share: None)
    assert {float(s["encoder_hidden_states"][0, 0, 0]) for s in inputs.unet} == {1.0}


def test_what_else_the_unet_is_told_is_kept() -> None:
    names = frozenset({"sample", "timestep", "encoder_hidden_states"})
    added = collect(PerfectModel("epsilon", added=True), plan(), lambda share: None)
    assert {frozenset(kept) for kept in added.unet} == {names | {"text_embeds", "time_ids"}}
    few = plan(few_steps=(2, 1), sampler="lcm", embedded_guidance=True)
    lcm = collect(PerfectModel("epsilon", embedded=True), few, lambda share: None)
    assert {frozenset(kept) for kept in lcm.unet} == {names | {"timestep_cond"}}
    assert len(lcm.unet) == few.evaluations == 2 + 1 + 2 + 1


def test_text_encoders_unet_and_decoder_run_one_after_the_other() -> None:
    model = PerfectModel("epsilon")
    collect(model, plan(), lambda share: None)
    phases = [name for name, _ in itertools.groupby(model.calls)]
    assert phases == ["conditions", "predict", "decode"]


@pytest.mark.parametrize("sampler", ["lcm", "euler", "euler_ancestral"])
def test_few_step_models_are_asked_where_their_sampler_asks(sampler: SamplerName) -> None:
    config = SchedulerConfig.from_dict({**SCHEDULER, "timestep_spacing": "trailing"})
    few = plan(few_steps=(4, 1), sampler=sampler, guidance_scale=1.0)
    inputs = collect(PerfectModel("epsilon"), few, lambda share: None)
    assert few.evaluations == len(inputs.unet) == 10
    own = trajectory_grid(few, 0, config)
    assert own.steps == 4
    expected = make_grid(sampler, config, 4)
    assert own.levels == expected.levels
    np.testing.assert_allclose(inputs.tiny_vae[0]["latent_sample"], PICTURE, atol=2e-2)


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
    for component in ("unet", "vae_decoder", "vae_encoder", "tiny_vae"):
        path = tmp_path / f"{component}.npz"
        save_samples(path, inputs.of(component))
        for one, other in zip(load_samples(path), inputs.of(component), strict=True):
            assert {name: array.dtype for name, array in one.items()} == {
                name: array.dtype for name, array in other.items()
            }
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


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


def test_plans_of_few_step_models_have_their_own_steps() -> None:
    def made(**changes: Any) -> CalibrationPlan:
        recipe = CalibrationRecipe(**changes.pop("recipe", {}))
        given: dict[str, Any] = {"unet_bytes": 1, "guidance_scale": 8.5, "shape": (4, 8, 8)}
        return make_plan(recipe, ["a"] * 96, **given, **changes)

    lcm = made(distilled="lcm", embedded_guidance=True)
    assert lcm.sampler == "lcm"
    assert lcm.branches == 1
    assert lcm.evaluations == 8 * (4 + 1 + 8 + 2 + 6 + 3)
    assert made(distilled="heun").sampler == "euler"
    assert made(distilled="euler").branches == 2
    asked = made(distilled="lcm", recipe={"strata": 5})
    assert asked.few_steps == ()
    assert asked.steps(3) == 6
    assert made().few_steps == ()


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
