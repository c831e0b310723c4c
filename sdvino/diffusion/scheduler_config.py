"""A folder's scheduler_config.json: read, checked, and handed to each sampler as diffusers would.

The file was written by some diffusers scheduler class. Another class made from it with
``from_config`` takes the fields it knows and its own defaults for the rest; so does a sampler here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdvino.errors import ModelFolderError
from sdvino.settings import TIMESTEP_SPACINGS, SamplerName, TimestepSpacing

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

_FILE = "scheduler_config.json"
_MAX_TRAIN_TIMESTEPS = 10_000

#: diffusers class -> sampler that does exactly the same.
_SAMPLER_OF_CLASS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
#: diffusers class -> the nearest sampler here.
_NEAREST_SAMPLER: dict[str, SamplerName] = {
    "DDPMScheduler": "ddim",
    "DDPMParallelScheduler": "ddim",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverSDEScheduler": "dpmpp_2m_sde",
    "SASolverScheduler": "dpmpp_2m_sde",
}
_OTHERWISE: SamplerName = "dpmpp_2m"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """Everything a sampler and its grid read. Names, meanings and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    # Clipping of the denoised latents
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    # Sigmas between the ends of the grid
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -math.inf
    # DDIM, PNDM
    set_alpha_to_one: bool = True
    skip_prk_steps: bool = False
    # Euler
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    # DPM-Solver++, UniPC
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    predict_x0: bool = True
    variance_type: str | None = None
    # LCM, TCD
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


_COMMON = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    }
)
_THRESHOLD = frozenset({"thresholding", "dynamic_thresholding_ratio", "sample_max_value"})
_CLIP = frozenset({"clip_sample", "clip_sample_range"})
_SIGMAS = frozenset(
    {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max"}
)
_ZERO_SNR = frozenset({"rescale_betas_zero_snr"})
_MULTISTEP = frozenset({"solver_order", "solver_type", "lower_order_final", "final_sigmas_type"})
_DISTILLED = frozenset({"original_inference_steps", "timestep_scaling", "set_alpha_to_one"})
_DPM = frozenset({"euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type"})
_EULER = frozenset({"interpolation_type", "timestep_type", "final_sigmas_type"})

#: Which fields each sampler's diffusers class reads.
_FIELDS_OF: dict[SamplerName, frozenset[str]] = {
    "ddim": _COMMON | _CLIP | _THRESHOLD | _ZERO_SNR | {"set_alpha_to_one"},
    "euler": _COMMON | _SIGMAS | _ZERO_SNR | _EULER,
    "euler_ancestral": _COMMON | _ZERO_SNR,
    "heun": _COMMON | _SIGMAS | _CLIP,
    "dpmpp_2m": _COMMON | _SIGMAS | _THRESHOLD | _ZERO_SNR | _MULTISTEP | _DPM,
    "dpmpp_2m_sde": _COMMON | _SIGMAS | _THRESHOLD | _ZERO_SNR | _MULTISTEP | _DPM,
    "unipc": _COMMON
    | _SIGMAS
    | _THRESHOLD
    | _ZERO_SNR
    | _MULTISTEP
    | {"disable_corrector", "predict_x0"},
    "lms": _COMMON | _SIGMAS,
    "pndm": _COMMON | {"skip_prk_steps", "set_alpha_to_one"},
    "lcm": _COMMON | _CLIP | _THRESHOLD | _ZERO_SNR | _DISTILLED,
    "tcd": _COMMON | _ZERO_SNR | _DISTILLED,
}
_LATENT_DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
#: Where a diffusers class has another default than SamplerConfig.
_DEFAULTS_OF: dict[SamplerName, dict[str, Any]] = {
    "ddim": {"clip_sample": True, "timestep_spacing": "leading"},
    "heun": _LATENT_DIFFUSION,
    "unipc": {"solver_type": "bh2"},
    "pndm": {"set_alpha_to_one": False, "timestep_spacing": "leading"},
    "lcm": {
        **_LATENT_DIFFUSION,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
    },
    "tcd": {
        **_LATENT_DIFFUSION,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What a scheduler_config.json says, every value checked."""

    #: The diffusers class that wrote it, when it says so.
    class_name: str | None = None
    #: The fields that stand in it and mean something here. null counts as absent.
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> SchedulerConfig:
        """Check ``config``, the parsed JSON of a scheduler_config.json.

        Raises:
            ModelFolderError: a field has a wrong type, is not finite, or is absurd; or the model is
            one for flow matching or EDM.
        """
        if not isinstance(config, Mapping):
            raise ModelFolderError(f"{_FILE} does not hold an object; get the file again.")
        class_name = _class_name(config)
        _refuse_other_processes(class_name, config)
        unset = config.get("_use_default_values", ())
        skipped = set(unset) if isinstance(unset, list) and _all_text(unset) else set()
        given = {
            name: check(name, config[name])
            for name, check in _CHECKS.items()
            if config.get(name) is not None and name not in skipped
        }
        if given.get("use_karras_sigmas") and given.get("use_exponential_sigmas"):
            raise ModelFolderError(
                f"{_FILE} asks for Karras and exponential sigmas at once; set one of them to false."
            )
        if given.get("sigma_min", 0.0) >= given.get("sigma_max", math.inf):
            raise ModelFolderError(f"{_FILE} has a sigma_min not below its sigma_max; swap them.")
        return cls(class_name=class_name, given=given)

    def for_sampler(self, sampler: SamplerName) -> SamplerConfig:
        """Return the fields that ``sampler`` reads, with its own defaults for those not given."""
        known = _FIELDS_OF[sampler]
        given = {name: value for name, value in self.given.items() if name in known}
        return SamplerConfig(**{**_DEFAULTS_OF.get(sampler, {}), **given})


def sampler_from_config(config: Mapping[str, object]) -> tuple[SamplerName, str | None]:
    """Return the sampler that a scheduler_config.json names, or the nearest one.

    Returns:
        The sampler, and a sentence that names an unknown scheduler and what is used instead (None
        when the sampler does exactly what diffusers' class does).

    Raises:
        ModelFolderError: the class name is no text, or the model is one for flow matching or EDM,
            which none of the samplers fits.
    """
    name = _class_name(config)
    if name is None:
        return _OTHERWISE, f"{_FILE} names no scheduler; using {_OTHERWISE} instead."
    _refuse_other_processes(name, config)
    if name == "DPMSolverMultistepScheduler":
        return _dpm_solver(config.get("algorithm_type"))
    if name in _SAMPLER_OF_CLASS:
        return _SAMPLER_OF_CLASS[name], None
    sampler = _NEAREST_SAMPLER.get(name, _OTHERWISE)
    return sampler, f"The scheduler {name[:80]} is not known here; using {sampler} instead."


def _refuse_other_processes(name: str | None, config: Mapping[str, object]) -> None:
    """Refuse flow matching and EDM: their models would give noise with any sampler here."""
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if flow or (name is not None and ("FlowM" in name or name.startswith("EDM"))):
        raise ModelFolderError(
            f"{_FILE} is one for flow matching or EDM, which Stable Diffusion 1.x, 2.x and XL do "
            "not use; choose a model of those families."
        )


def _dpm_solver(algorithm: object) -> tuple[SamplerName, str | None]:
    if algorithm is None or algorithm in ("dpmsolver++", "deis"):  # deis: as diffusers does
        return "dpmpp_2m", None
    if algorithm == "sde-dpmsolver++":
        return "dpmpp_2m_sde", None
    sampler: SamplerName = "dpmpp_2m_sde" if algorithm == "sde-dpmsolver" else "dpmpp_2m"
    what = f"DPMSolverMultistepScheduler's algorithm {str(algorithm)[:80]!r}"
    return sampler, f"{what} is not known here; using {sampler} instead."


def _class_name(config: Mapping[str, object]) -> str | None:
    name = config.get("_class_name")
    if name is not None and not isinstance(name, str):
        raise ModelFolderError(f"{_FILE} has a _class_name that is no text; get the file again.")
    return name


def _all_text(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _wrong(name: str, value: object, expected: str) -> ModelFolderError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return ModelFolderError(f"{_FILE} says {name} is {shown}; it must be {expected}.")


Check = Callable[[str, object], Any]


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(name, value, "a number")
        if not low <= value <= high:  # so is NaN not
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def _one_of(*choices: str) -> Check:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _wrong(name, value, f"one of {', '.join(choices)}")
        return value

    return check


def _betas(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_TRAIN_TIMESTEPS:
        raise _wrong(name, value, f"a list of 1 to {_MAX_TRAIN_TIMESTEPS} numbers")
    check = _number(1e-12, 0.999_999)
    return tuple(check(name, beta) for beta in value)


def _indices(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_TRAIN_TIMESTEPS:
        raise _wrong(name, value, "a list of step numbers")
    check = _whole(0, _MAX_TRAIN_TIMESTEPS)
    return tuple(check(name, index) for index in value)


_CHECKS: dict[str, Check] = {
    "num_train_timesteps": _whole(2, _MAX_TRAIN_TIMESTEPS),
    "beta_start": _number(1e-12, 0.999),
    "beta_end": _number(1e-12, 0.999),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2", "exp"),
    "trained_betas": _betas,
    "prediction_type": _one_of("epsilon", "v_prediction", "sample"),
    "timestep_spacing": _one_of(*TIMESTEP_SPACINGS),
    "steps_offset": _whole(0, _MAX_TRAIN_TIMESTEPS),
    "rescale_betas_zero_snr": _flag,
    "clip_sample": _flag,
    "clip_sample_range": _number(1e-6, 1e6),
    "thresholding": _flag,
    "dynamic_thresholding_ratio": _number(0.0, 1.0),
    "sample_max_value": _number(1.0, 1e6),
    "use_karras_sigmas": _flag,
    "use_exponential_sigmas": _flag,
    "use_beta_sigmas": _flag,
    "use_lu_lambdas": _flag,
    "sigma_min": _number(1e-6, 1e6),
    "sigma_max": _number(1e-6, 1e6),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "lambda_min_clipped": _number(-math.inf, 100.0),
    "set_alpha_to_one": _flag,
    "skip_prk_steps": _flag,
    "interpolation_type": _one_of("linear", "log_linear"),
    "timestep_type": _one_of("discrete", "continuous"),
    "solver_order": _whole(1, 4),
    "solver_type": _one_of("midpoint", "heun", "logrho", "bh1", "bh2"),
    "lower_order_final": _flag,
    "euler_at_final": _flag,
    "disable_corrector": _indices,
    "predict_x0": _flag,
    "variance_type": _one_of("learned", "learned_range", "fixed_small", "fixed_large"),
    "original_inference_steps": _whole(1, _MAX_TRAIN_TIMESTEPS),
    "timestep_scaling": _number(0.0, 1e6),
}
