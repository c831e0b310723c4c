"""Reading and writing the IR of a component while a folder is made."""

from __future__ import annotations

import gc
from pathlib import Path

import openvino as ov

from sdvino.graph.saving import given_names, save_graph


def make_core() -> ov.Core:
    """Return a Core that reads files into memory: a mapped file cannot be renamed on Windows."""
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core


def read_ir(xml: Path) -> ov.Model:
    """Return the model in ``xml`` and the .bin beside it."""
    return make_core().read_model(xml)


def save_ir(model: ov.Model, xml: Path) -> None:
    """Write ``model`` with its float constants in half precision, over what ``xml`` holds now.

    The old files are replaced only when the new ones are complete.
    """
    fresh = xml.with_name(f"new-{xml.name}")
    save_graph(model, fresh, standing=given_names(model))
    del model
    gc.collect()
    for suffix in (".bin", ".xml"):
        fresh.with_suffix(suffix).replace(xml.with_suffix(suffix))
