"""The profile and the guard of a model that is about to run."""

from __future__ import annotations

import logging

from sdvino.folder.index import ModelFolder
from sdvino.runtime.acceleration import with_stored
from sdvino.runtime.guard import Guard
from sdvino.runtime.profile import ProfileMemory, ProfileStore, profile_key
from sdvino.runtime.topology import read_cpu
from sdvino.runtime.tuned import apply_profile
from sdvino.settings import RunSettings

_log = logging.getLogger("sdvino")


def tuned_run(
    folder: ModelFolder, settings: RunSettings, *, profile: bool = True
) -> tuple[RunSettings, Guard]:
    """Return the settings to run ``folder`` with, and what watches over its numbers.

    What the folder stores for a device like this machine's comes last, where all leave a choice.
    With ``profile``, what `sdvino tune` found on this machine is put where ``settings`` leave a
    choice, which the log says once, and what the guard learns is kept for later runs.
    """
    stored = () if folder.manifest is None else folder.manifest.accelerated
    isa = read_cpu().isa
    if not profile:
        return with_stored(settings, stored, isa), Guard()
    memory = ProfileMemory(ProfileStore(), profile_key(folder), folder.name)
    found = memory.profile
    tuned = apply_profile(settings, found) if found.components else settings
    if tuned != settings:
        _log.warning(
            "Using the profile that `sdvino tune` measured for %s on %s; --no-profile ignores it.",
            found.name,
            found.tuned,
        )
    return with_stored(tuned, stored, isa), Guard(memory)
