"""The profile and the guard of a model that is about to run."""

from __future__ import annotations

import logging

from sdvino.model_folder import ModelFolder
from sdvino.runtime.guard import Guard
from sdvino.runtime.profile import ProfileMemory, ProfileStore, profile_key
from sdvino.runtime.tuned import apply_profile
from sdvino.settings import RunSettings

_log = logging.getLogger("sdvino")


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
