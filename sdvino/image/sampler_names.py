"""Names of samplers and schedules as pictures carry them: A1111's, and everybody's spellings."""

from __future__ import annotations

import re
from typing import Any

from sdvino.settings import SamplerName, SigmaScheduleName

_TITLES: dict[SamplerName, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
#: A1111's schedule types; "Uniform" is the sampler's own grid.
SCHEDULE_TITLES: dict[SigmaScheduleName, str] = {
    "default": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
}
#: Other spellings, without what is not a letter or digit: k-diffusion, diffusers, sd.cpp, ComfyUI.
_ALIASES: dict[str, SamplerName] = {
    "keuler": "euler",
    "eulerdiscrete": "euler",
    "keulera": "euler_ancestral",
    "eulerancestral": "euler_ancestral",
    "keulerancestral": "euler_ancestral",
    "eulerancestraldiscrete": "euler_ancestral",
    "kheun": "heun",
    "heundiscrete": "heun",
    "dpmsolvermultistep": "dpmpp_2m",
    "kdpmpp2m": "dpmpp_2m",
    "kdpmpp2msde": "dpmpp_2m_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "unipcmultistep": "unipc",
    "unipcbh2": "unipc",
    "klms": "lms",
    "lmsdiscrete": "lms",
    "pndm": "pndm",
}


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


_KNOWN: dict[str, SamplerName] = {
    **_ALIASES,
    **{_squeeze(title): name for name, title in _TITLES.items()},
    **{_squeeze(name): name for name in _TITLES},
}


def sampler_title(name: SamplerName) -> str:
    """Return A1111's name of a sampler: "Euler a" for euler_ancestral."""
    return _TITLES[name]


def parse_sampler(text: str) -> dict[str, Any] | None:
    """Return the settings a sampler's name stands for, by field; None for an unknown one.

    A1111 before 1.9 put the schedule into it: "DPM++ 2M Karras".
    """
    if len(text) > 64:
        return None
    squeezed = _squeeze(text).removesuffix("scheduler")
    for schedule in ("karras", "exponential"):
        name = _KNOWN.get(squeezed.removesuffix(schedule))
        if name is not None and squeezed.endswith(schedule):
            return {"scheduler": name, "sigma_schedule": schedule}
    name = _KNOWN.get(squeezed)
    return None if name is None else {"scheduler": name}


def parse_schedule(text: str) -> SigmaScheduleName | None:
    """Return the sigma schedule of A1111's "Schedule type"; None for another or "Automatic"."""
    for name, title in SCHEDULE_TITLES.items():
        if text.lower() in (title.lower(), name):
            return name
    return None
