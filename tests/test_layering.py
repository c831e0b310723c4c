"""Imports point one way, and importing sdvino costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdvino"

#: The lowest first. A module may import its own layer and those below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("inputs",),
    ("settings",),
    ("weights",),
    ("nets",),
    ("families",),
    ("folder",),
    ("request",),
    ("diffusion",),
    ("graph",),
    ("runtime",),
    ("outputs",),
    ("text", "image"),
    ("pipeline",),
    ("tuning",),
    ("compress",),
    ("convert",),
    ("train",),
    ("first_use",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
#: The imports that point up, each made when it is needed alone: from_pretrained takes a checkpoint
#: as it is, and a step of a conversion may take torch.
UP = {
    ("sdvino.pipeline", "sdvino.first_use.resolve"),
    ("sdvino.convert.worker", "sdvino.train.steps"),
    ("sdvino.convert.export", "sdvino.train.optimum_export"),
}
#: Rooms beside each other that know nothing of each other.
APART = ({"text", "diffusion"}, {"text", "image"})
#: Rooms that are NumPy alone, and what of sdvino they may import.
NUMPY_ALONE = {
    "diffusion": {"diffusion", "settings", "errors"},
    "weights": {"weights", "inputs", "errors"},
}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "optimum", "nncf", "accelerate"}
#: Rooms -> what they may import of it.
ROOM_LIBRARIES = {"compress": {"nncf"}, "convert": {"nncf"}, "train": HEAVY}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The part of sdvino that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = room(name_of(path))
    if own == "__init__":
        return  # the public names are loaded lazily, from everywhere
    assert own in LEVEL, f"{own} has no place among the layers"
    for module in imports(path):
        if module.partition(".")[0] != "sdvino" or module == "sdvino":
            continue
        if (name_of(path), module) in UP:
            continue
        other = room(module)
        assert LEVEL[other] <= LEVEL[own], f"{name_of(path)} imports {module}, which is above it"
        assert other == own or {own, other} not in APART, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room(name_of(path)) in NUMPY_ALONE], ids=name_of
)
def test_numerical_rooms_are_numpy_alone(path: Path) -> None:
    for module in imports(path):
        if module.startswith("sdvino."):
            assert room(module) in NUMPY_ALONE[room(name_of(path))], module
        assert module.partition(".")[0] not in {"openvino", *HEAVY}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    allowed = ROOM_LIBRARIES.get(room(name_of(path)), set())
    found = {module.partition(".")[0] for module in imports(path)}
    assert found & HEAVY <= allowed


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a new process holds after ``code``."""
    shown = f"{code}\nimport sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return {name.partition(".")[0] for name in result.stderr.split()}


def test_import_sdvino_is_light() -> None:
    assert not loaded_by("import sdvino") & {*HEAVY, "openvino", "numpy", "PIL", "huggingface_hub"}


def test_the_pipeline_does_without_torch() -> None:
    loaded = loaded_by("import sdvino; sdvino.StableDiffusionPipeline")
    assert "sdvino" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    loaded = loaded_by(f"from sdvino.cli.main import main; assert main({arguments!r}) == 0")
    assert "click" in loaded
    assert not loaded & {*HEAVY, "openvino"}
