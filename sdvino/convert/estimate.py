"""What a conversion will need: disk, memory and time, worked out and checked before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdvino.convert.request import WorkPlan
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import OutputError


def check_needs(source: DiffusersFolder, plan: WorkPlan, folder: Path) -> None:
    """Raise OutputError when the disk cannot hold the model while it is made."""
    largest = max(source.bytes_of(name) for name in source.weights)
    needed = largest + 2 * sum(source.bytes_of(theirs) for theirs in source.components.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"Converting needs {needed / 1e9:.1f} GB on the disk of the target and"
            f" {free / 1e9:.1f} GB are free; free some space or choose another folder."
        )
