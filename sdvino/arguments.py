"""What a call of the pipeline was given, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdvino.errors import RequestError
from sdvino.outputs import Array, Embeddings
from sdvino.settings import GuidanceMode, RunSettings, SpeedSettings


def run_settings(
    device: str | Mapping[str, str] | None, settings: RunSettings | None
) -> RunSettings:
    """Return ``settings`` with the device, or the devices by component, put in."""
    if device is None:
        return RunSettings(any_device=True) if settings is None else settings
    settings = RunSettings() if settings is None else settings
    if isinstance(device, str):
        default = replace(settings.default, device=device)
        return replace(settings, default=default, any_device=False)
    default = replace(settings.default, device=device.get("default", settings.default.device))
    components = {
        name: replace(settings.for_component(name), device=value)
        for name, value in device.items()
        if name != "default"
    }
    components = {**settings.components, **components}
    return replace(settings, default=default, components=components, any_device=False)


def speed_settings(
    speed: SpeedSettings | None,
    guidance_mode: GuidanceMode | None,
    guidance_interval: tuple[float, float] | None,
) -> SpeedSettings:
    """Return ``speed`` with what is given beside it put in; raises RequestError."""
    speed = SpeedSettings() if speed is None else speed
    if guidance_mode is not None:
        speed = replace(speed, guidance_mode=guidance_mode)
    if guidance_interval is not None:
        if len(guidance_interval) != 2:
            raise RequestError("The guidance interval takes two fractions, such as (0.1, 0.8).")
        start, end = guidance_interval
        speed = replace(speed, guidance_interval=(float(start), float(end)))
    return speed


def embeddings_of(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    *,
    prompt_embeds: Array | None,
    negative_prompt_embeds: Array | None,
    pooled_prompt_embeds: Array | None,
    negative_pooled_prompt_embeds: Array | None,
) -> Embeddings:
    """Return the text states given to a call; raises RequestError beside a prompt."""
    if (prompt is None) == (prompt_embeds is None):
        raise RequestError("Give either a prompt or prompt_embeds, and not both.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise RequestError("Give either a negative_prompt or negative_prompt_embeds, not both.")
    return Embeddings(
        prompt=_states("prompt_embeds", prompt_embeds, 3),
        negative=_states("negative_prompt_embeds", negative_prompt_embeds, 3),
        pooled=_states("pooled_prompt_embeds", pooled_prompt_embeds, 2),
        negative_pooled=_states("negative_pooled_prompt_embeds", negative_pooled_prompt_embeds, 2),
    )


def _states(name: str, value: Array | None, rank: int) -> Array | None:
    if value is None:
        return None
    states = np.ascontiguousarray(value, np.float32)
    if states.ndim != rank or not len(states):
        wanted = "[N, length, width]" if rank == 3 else "[N, width]"
        raise RequestError(f"The {name} have the shape {list(states.shape)}; give {wanted}.")
    if not np.isfinite(states).all():
        raise RequestError(f"The {name} hold NaN or infinity; give finite numbers.")
    return states


def state_of(states: Array | None, index: int) -> Array | None:
    """Return the state of one prompt, float32 [1, ...]; a single one serves all."""
    if states is None:
        return None
    if index >= len(states) > 1:
        raise RequestError(
            f"There are embeddings for {len(states)} prompts and more prompts than that;"
            " give one, or one for each."
        )
    return states[:1] if len(states) == 1 else states[index : index + 1]


def given_latents(latents: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Return the noise given to a call, float32 of ``shape``; raises RequestError."""
    if latents is None:
        return None
    given = np.asarray(latents, np.float32)
    if given.shape != shape:
        raise RequestError(
            f"The latents have the shape {list(given.shape)}; this request takes {list(shape)}."
        )
    if not np.isfinite(given).all():
        raise RequestError("The latents hold NaN or infinity; give finite noise.")
    return given
