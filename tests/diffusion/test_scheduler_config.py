from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.diffusion.scheduler_config import (
    _CHECKS,
    _FIELDS_OF,
    SamplerConfig,
    SchedulerConfig,
    sampler_from_config,
)
from sdvino.errors import ModelFolderError
from sdvino.settings import SAMPLERS, SamplerName
from tests.diffusion.oracle import STABLE_DIFFUSION, diffusers_config


def test_every_field_has_a_check() -> None:
    assert {field.name for field in fields(SamplerConfig)} == set(_CHECKS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_and_fields_are_those_of_diffusers_class(sampler: SamplerName) -> None:
    theirs = diffusers_config(sampler)
    ours = SchedulerConfig.from_dict({}).for_sampler(sampler)
    for name in _FIELDS_OF[sampler] & theirs.keys():
        expected = theirs[name] if theirs[name] != [] else ()
        assert getattr(ours, name) == expected, name
    # What is not read here must be something that the class does not have, or does not use.
    unused = {"algorithm_type", "solver_p", "use_flow_sigmas", "flow_shift", "shift_terminal"}
    unused |= {"use_dynamic_shifting", "time_shift_type"}
    if sampler == "lcm" or sampler == "tcd":
        unused |= {"steps_offset"}
    if sampler == "tcd":
        unused |= {"clip_sample", "clip_sample_range", "thresholding"}
        unused |= {"dynamic_thresholding_ratio", "sample_max_value"}
    missing = {name for name in theirs if not name.startswith("_")} - _FIELDS_OF[sampler]
    assert missing <= unused


def test_values_given_are_kept_by_those_who_read_them() -> None:
    config = SchedulerConfig.from_dict({**STABLE_DIFFUSION, "_class_name": "PNDMScheduler"})
    assert config.class_name == "PNDMScheduler"
    assert config.for_sampler("ddim").set_alpha_to_one is False
    assert config.for_sampler("euler").steps_offset == 1
    # Euler's class has no such field; its grid ends at zero.
    assert config.for_sampler("euler").set_alpha_to_one is True


def test_null_and_unused_defaults_count_as_absent() -> None:
    config = SchedulerConfig.from_dict(
        {
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "beta_schedule": None,
            "_use_default_values": ["timestep_spacing"],
            "a_field_of_the_future": [1, 2, 3],
        }
    )
    assert dict(config.given) == {"steps_offset": 1}


WRONG: list[dict[str, object]] = [
    {"num_train_timesteps": 10**9},
    {"num_train_timesteps": 1000.0},
    {"num_train_timesteps": True},
    {"num_train_timesteps": 1},
    {"beta_start": math.nan},
    {"beta_start": "0.00085"},
    {"beta_end": math.inf},
    {"beta_end": 10**400},
    {"beta_end": -0.1},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": ["linear"]},
    {"trained_betas": "0.1"},
    {"trained_betas": [0.1, math.nan]},
    {"trained_betas": [0.1] * 10_001},
    {"prediction_type": "flow_prediction"},
    {"prediction_type": {}},
    {"timestep_spacing": "log"},
    {"steps_offset": -1},
    {"clip_sample": 1},
    {"solver_order": 99},
    {"lambda_min_clipped": math.inf},
    {"disable_corrector": [0, -1]},
    {"sigma_min": 10.0, "sigma_max": 1.0},
    {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    {"use_flow_sigmas": True},
    {"_class_name": 3},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "EDMEulerScheduler"},
]


@pytest.mark.parametrize("config", WRONG)
def test_lies_are_refused_in_a_sentence(config: dict[str, object]) -> None:
    with pytest.raises(ModelFolderError, match=r"^scheduler_config\.json .*\w\.$") as refusal:
        SchedulerConfig.from_dict(config)
    assert len(str(refusal.value)) < 300


json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*_CHECKS, "_class_name", "_use_default_values"]), json_values)
)
def test_any_json_is_read_or_refused(config: dict[str, object]) -> None:
    try:
        read = SchedulerConfig.from_dict(config)
    except ModelFolderError:
        return
    for sampler in SAMPLERS:
        read.for_sampler(sampler)


def test_not_an_object() -> None:
    config: Any = ["DDIMScheduler"]
    with pytest.raises(ModelFolderError, match="does not hold an object"):
        SchedulerConfig.from_dict(config)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_diffusers_own_files_name_their_sampler(sampler: SamplerName) -> None:
    options = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    assert sampler_from_config(diffusers_config(sampler, **options)) == (sampler, None)


def test_unknown_schedulers_are_named_with_what_is_used_instead() -> None:
    sampler, note = sampler_from_config({"_class_name": "KDPM2AncestralDiscreteScheduler"})
    assert sampler == "euler_ancestral"
    assert note is not None
    assert "KDPM2AncestralDiscreteScheduler" in note
    assert "euler_ancestral" in note
    sampler, note = sampler_from_config({"_class_name": "MyScheduler" + "x" * 1000})
    assert sampler == "dpmpp_2m"
    assert note is not None
    assert len(note) < 200
    assert sampler_from_config({})[1] is not None


def test_older_dpm_solvers_are_named() -> None:
    name = diffusers.DPMSolverMultistepScheduler.__name__
    sampler, note = sampler_from_config({"_class_name": name, "algorithm_type": "sde-dpmsolver"})
    assert sampler == "dpmpp_2m_sde"
    assert note is not None
    assert "sde-dpmsolver" in note
    assert sampler_from_config({"_class_name": name}) == ("dpmpp_2m", None)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": ["DDIMScheduler"]},
    ],
)
def test_models_of_another_kind_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelFolderError):
        sampler_from_config(config)
