"""Converted models in the store, made in milliseconds rather than converted."""

from __future__ import annotations

import os
from pathlib import Path

from sdvino.first_use.store import ConvertedModels, Entry, Made
from tests.tiny_folder import make_tiny_folder


def fail_on_waiting() -> None:
    raise AssertionError("nobody else converts")


def add_model(
    store: ConvertedModels,
    key: str,
    *,
    name: str = "a-model",
    recipe: str = "int8",
    source: str = "source",
    used: float = 1e9,
) -> Entry:
    """Put a complete model into ``store``."""
    made = Made(name=name, recipe=recipe, source=source)
    with store.converting(key, made, fail_on_waiting) as entry:
        make_tiny_folder(entry.model)
    os.utime(entry.path / "entry.json", (used, used))
    found = store.entry(key)
    assert found is not None
    return found


def add_interrupted(store: ConvertedModels, key: str, *, name: str = "a-model") -> Path:
    """Put what a stopped conversion leaves into ``store``, and return the entry's folder."""
    with store.converting(
        key, Made(name=name, recipe="int8", source="s"), fail_on_waiting
    ) as entry:
        work = entry.path / ".model.sdvino-partial"
        work.mkdir()
        (work / "state.json").write_text("{}")
    return entry.path
