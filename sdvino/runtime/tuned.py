"""Settings with a profile put in: what the user chose always stands."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from sdvino.folder.index import ModelFolder
from sdvino.runtime.guard import Guard
from sdvino.runtime.profile import Profile, ProfileMemory, ProfileStore, profile_key
from sdvino.settings import COMPONENTS, DeviceSettings, RunSettings

_log = logging.getLogger("sdvino")
#: Fields that were measured together: whoever chooses one of them chooses for all.
_TOGETHER = ("num_threads", "num_streams", "core_type", "pinning", "hyper_threading")
#: Component -> whose measurements serve it when it was not measured itself.
_LIKE = {
    "text_encoder": "unet",
    "text_encoder_2": "text_encoder",
    "vae_encoder": "vae_decoder",
    "tiny_vae": "vae_decoder",
}


def tuned_run(
    folder: ModelFolder, settings: RunSettings, *, profile: bool = True
) -> tuple[RunSettings, Guard]:
    """Return the settings to run ``folder`` with, and what watches over its numbers.

    With ``profile``, what `sdvino tune` found on this machine is put where ``settings`` leave a
    choice, which the log says once, and what the guard learns is kept for later runs.
    """
    if not profile:
        return settings, Guard()
    memory = ProfileMemory(ProfileStore(), profile_key(folder), folder.name)
    found = memory.profile
    tuned = apply_profile(settings, found) if found.components else settings
    if tuned != settings:
        _log.warning(
            "Using the profile that `sdvino tune` measured for %s on %s; --no-profile ignores it.",
            found.name,
            found.tuned,
        )
    return tuned, Guard(memory)


def apply_profile(settings: RunSettings, profile: Profile) -> RunSettings:
    """Return ``settings`` with what ``profile`` found put where nothing was chosen.

    A device is taken from the profile only where nobody asked for one, and measurements of one
    device are not used on another.
    """
    components = {
        name: found
        for name in COMPONENTS
        if (found := _component(settings, profile, name)) is not None
    }
    mode = settings.guidance_mode
    return replace(
        settings,
        components={**settings.components, **components},
        # Measured on the device that the UNet then runs on, or not at all.
        guidance_mode=profile.guidance_mode if mode is None and "unet" in components else mode,
    )


def _component(settings: RunSettings, profile: Profile, name: str) -> DeviceSettings | None:
    """Return the settings of the component ``name``; None where the profile says nothing."""
    source = name
    while source not in profile.components:
        if source not in _LIKE:
            return None
        source = _LIKE[source]
    tuned = profile.components[source].settings
    device = str(tuned.get("device", DeviceSettings().device))
    own = settings.for_component(name)
    if settings.any_device:
        own = replace(own, device=device)
    elif own.device.strip().upper() != device:
        return None
    placed = any(getattr(own, key) is not None for key in _TOGETHER)
    changes: dict[str, Any] = {
        key: value
        for key, value in tuned.items()
        if key != "device"
        and getattr(own, key) is None
        and not (key in _TOGETHER and (placed or own.performance_hint != "latency"))
        # An arithmetic is measured for the component itself, and stands until a picture shows it to
        # be wrong.
        and (key != "precision" or (source == name and name not in profile.fallbacks))
    }
    return replace(own, **changes)
