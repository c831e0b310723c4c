"""A graph saved so that its bytes tell what it computes, and nothing of how it came about.

OpenVINO calls what nobody names by its type and a number, `Constant_729780`, and counts through the
whole process: the same graph has other names when other work was done before it, as in a conversion
that was interrupted. Here such names become the type and a position: `Constant.12`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Collection
from pathlib import Path

import openvino as ov

# With what was made of the name of another operation: Constant_12_compressed, Convert_7.2.
_AUTOMATIC = re.compile(r"([A-Z][A-Za-z0-9]*)_\d+(?![A-Za-z0-9])")
_POSITION = re.compile(r"[A-Z][A-Za-z0-9]*\.\d+")


def save_graph(
    model: ov.Model,
    xml: Path,
    *,
    name: str | None = None,
    standing: Collection[str] = frozenset(),
) -> None:
    """Write ``model`` as ``xml`` and the .bin beside it, its float constants in half precision.

    ``name`` is the model's own, which OpenVINO numbers too; None leaves what it has. ``standing``
    are names that came with the model and stay, whatever they look like (see `name_by_position`).
    ``model`` is renamed by it. Weights are not copied.
    """
    if name is not None:
        model.set_friendly_name(name)
    name_by_position(model, standing)
    ov.save_model(model, xml, compress_to_fp16=True)


def given_names(model: ov.Model) -> frozenset[str]:
    """Return the names in ``model`` that somebody, or the file that it was read from, gave."""
    return frozenset(
        op.get_friendly_name() for op in model.get_ops() if op.get_friendly_name() != op.get_name()
    )


def name_by_position(model: ov.Model, standing: Collection[str] = frozenset()) -> None:
    """Give operations with automatic names, and their tensors, names by their place in the graph.

    A name in ``standing`` is kept: layers are found by it in the float graph and in the compressed
    one. No name becomes that of another operation.
    """
    standing = frozenset(standing)
    operations = model.get_ordered_ops()
    renamed = []
    taken: set[str] = set()
    for operation in operations:
        name = operation.get_friendly_name()
        # One that nobody named may be called like one that was read from a file.
        given = name in standing and name != operation.get_name()
        match = None if given else _AUTOMATIC.match(name)
        if match is not None:
            renamed.append((operation, name, match))
        elif (known := _POSITION.match(name)) is not None:
            taken.add(known[0])
    stems: dict[str, str] = {}
    counts: dict[str, int] = {}
    for operation, name, match in renamed:
        stem = match[0]
        if stem not in stems:
            stems[stem] = _next_free(match[1], counts, taken)
        operation.set_friendly_name(stems[stem] + name[match.end() :])
    _rename_tensors(operations, stems)


def _next_free(kind: str, counts: dict[str, int], taken: Collection[str]) -> str:
    """Return ``kind`` and the next number that makes a name not in ``taken``."""
    while True:
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        if f"{kind}.{number}" not in taken:
            return f"{kind}.{number}"


def _rename_tensors(operations: list[ov.Node], stems: dict[str, str]) -> None:
    """Let tensors that are called after an operation follow it: openvino_tokenizers names some."""
    for operation in operations:
        for port in operation.outputs():
            names = port.get_names()
            if any(name in stems for name in names):
                port.set_names({stems.get(name, name) for name in names})


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
