"""The scheduler of a converted folder: one that OpenVINO GenAI knows, the better one suggested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Classes that OpenVINO GenAI runs Stable Diffusion with; it throws on any other.
GENAI_SCHEDULERS: tuple[str, ...] = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
)
_FALLBACK = "DDIMScheduler"
# The samplers that training scripts left in folders for years: nobody's choice, so a better one
# may be suggested in their place.
_HISTORIC = ("DDIMScheduler", "PNDMScheduler")
# Models distilled for these need few steps and hardly any guidance.
_DISTILLED = ("LCMScheduler", "TCDScheduler")


def portable_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` (a scheduler_config.json) naming a scheduler that GenAI knows.

    Another class becomes DDIM over the same betas; its fields stay, as classes ignore those they
    do not know. The two corrections are those that diffusers' Stable Diffusion pipeline makes to
    outdated files when it loads them: latents are never clipped (said of every scheduler, as in
    Stable Diffusion 1.5's own file: DDIM in another's place would clip), and a steps_offset is 1.
    """
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    if result.get("_class_name") not in GENAI_SCHEDULERS:
        result["_class_name"] = _FALLBACK
        result.setdefault("set_alpha_to_one", False)
    result["clip_sample"] = False
    if result.get("steps_offset") is not None:
        result["steps_offset"] = 1
    return result


def is_historic(config: Mapping[str, Any]) -> bool:
    """Tell whether the folder names a scheduler by habit rather than by choice."""
    return config.get("_class_name", _FALLBACK) in _HISTORIC


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Tell whether the model was distilled to make a picture in a few steps."""
    return config.get("_class_name") in _DISTILLED
