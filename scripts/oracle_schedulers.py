"""diffusers' scheduler for each sampler, spacing and sigma schedule: the oracle of the samplers.

Imported by the tests and by the command that prints the oracle's table. Needs the convert extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from sdvino.settings import SamplerName, SigmaScheduleName, TimestepSpacing

#: The diffusers class of each sampler.
CLASSES: dict[SamplerName, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
_ALGORITHMS: dict[str, str] = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}
_SPACINGS: tuple[TimestepSpacing, ...] = ("linspace", "leading", "trailing")
_SIGMAS: tuple[SigmaScheduleName, ...] = ("default", "karras", "exponential")
_SIGMA_SCHEDULED = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lms")
_DISTILLED = ("lcm", "tcd")


@dataclass(frozen=True)
class Combination:
    """A sampler on a grid that diffusers has too."""

    sampler: SamplerName
    timestep_spacing: TimestepSpacing
    sigma_schedule: SigmaScheduleName

    def __str__(self) -> str:
        return f"{self.sampler}-{self.timestep_spacing}-{self.sigma_schedule}"


#: Every sampler with every spacing and sigma schedule that diffusers has for it.
COMBINATIONS: tuple[Combination, ...] = tuple(
    Combination(sampler, spacing, sigmas)
    for sampler in CLASSES
    for spacing in (("leading",) if sampler in _DISTILLED else _SPACINGS)
    for sigmas in (_SIGMAS if sampler in _SIGMA_SCHEDULED else ("default",))
)


def oracle_scheduler(
    config: Mapping[str, object],
    sampler: SamplerName,
    timestep_spacing: TimestepSpacing | None = None,
    sigma_schedule: SigmaScheduleName | None = None,
) -> Any:
    """Return diffusers' scheduler for ``sampler``, made from the folder's ``config``.

    None leaves spacing and sigmas to ``config``, or where it says nothing to the class's defaults.
    """
    options: dict[str, object] = {}
    if timestep_spacing is not None:
        options["timestep_spacing"] = timestep_spacing
    if sampler in _ALGORITHMS:
        options["algorithm_type"] = _ALGORITHMS[sampler]
    if sigma_schedule is not None and sampler in _SIGMA_SCHEDULED:
        options["use_karras_sigmas"] = sigma_schedule == "karras"
        options["use_exponential_sigmas"] = sigma_schedule == "exponential"
        if sampler in _ALGORITHMS:
            options["use_lu_lambdas"] = False
    return CLASSES[sampler].from_config(dict(config), **options)
