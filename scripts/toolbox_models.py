"""The converted folders that scripts/measure_toolbox.py compares: made once, and weighed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph_coverage import fix_shapes, planned_layers
from measure_compression import SOURCE, hashed
from toolbox_variants import PAIRS, VARIANTS, Variant

from sdvino.compress.recipe_file import to_toml
from sdvino.compress.recipes import RECIPES, get_recipe
from sdvino.compress.weight_graph import weight_bytes
from sdvino.convert.api import convert
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.graph.saving import read_ir
from sdvino.inputs.files import sha256_of
from sdvino.weights.layouts.diffusers import weight_files
from sdvino.weights.safetensors import open_tensors

Say = Callable[[str], None]

#: Times that a budget is lowered until a component by layer fits into the bytes of the other.
_TRIES = 4
_F32 = 4


@dataclass(frozen=True, slots=True)
class Facts:
    """What a converted folder weighs."""

    #: The UNet's weights, and those of them that are not zero.
    parameters: int
    nonzero: int
    #: Multiply-adds of one evaluation of the UNet, for a picture of the model's own size.
    operations: int
    #: Of the UNet's constants, and of all components' files.
    unet_bytes: int
    bytes: int
    #: Of all components' files if every number in them had 32 bits.
    float_bytes: int
    #: Median of what is left of the rank, over the layers that are of low rank; None: none is.
    rank_share: float | None
    #: Of local: how many of the UNet's layers are stored in which bits.
    bits: Mapping[str, int]


class Workshop:
    """Converts what a variant needs into ``record``/models, unless that was done before."""

    def __init__(self, record: Path, students: Mapping[str, Path], say: Say) -> None:
        self._models = record / "models"
        self._students = students
        self._say = say

    def missing(self, variant: Variant) -> bool:
        """Tell whether the variant's source was not given."""
        return variant.student is not None and variant.student not in self._students

    def source(self, variant: Variant) -> Path:
        """Return the source that the variant is converted from."""
        return SOURCE if variant.student is None else self._students[variant.student]

    def folder(self, variant: Variant) -> Path:
        """Return the variant's converted folder, made now if need be."""
        if variant.name in PAIRS:
            return self._at_same_bytes(variant)
        return self._converted(variant, self.recipe_of(variant))

    def recipe_of(self, variant: Variant) -> str | Path:
        """Return the name of a built-in recipe, or the file of another, written here if need be."""
        if variant.recipe in RECIPES or variant.recipe.endswith(".toml"):
            return variant.recipe
        return self._written(variant.name, variant.recipe)

    def _written(self, name: str, rows: str) -> Path:
        path = self._models.parent / "recipes" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name = '{name}'\n{rows}", encoding="utf-8")
        return path

    def _converted(self, variant: Variant, recipe: str | Path) -> Path:
        folder = self._models / variant.model
        stamp = folder.with_suffix(".json")
        key = {"source": digest_of(self.source(variant)), "recipe": to_toml(get_recipe(recipe))}
        if (folder / "sdvino.json").is_file() and (
            _read(stamp) == key or _made_elsewhere(folder, recipe)
        ):
            return folder
        self._say(f"{variant.name}: converting")
        stamp.unlink(missing_ok=True)
        convert(self.source(variant), folder, recipe=recipe, gate=None, overwrite=folder.exists())
        stamp.write_text(json.dumps(key, indent=1), encoding="utf-8")
        return folder

    def _at_same_bytes(self, variant: Variant) -> Path:
        """Return the UNet by layer in no more bytes than its pair's, and hardly fewer."""
        other = next(one for one in VARIANTS if one.name == PAIRS[variant.name])
        allowed = unet_bytes(self.folder(other))
        # What groups and activations add to a graph is not in the plan of local quantization.
        room = allowed // 500
        budget = allowed - room
        for _ in range(_TRIES):
            rows = variant.recipe.replace("budget = 0.5", f"budget = {float(budget)}")
            folder = self._converted(variant, self._written(variant.name, rows))
            found = unet_bytes(folder)
            if found <= allowed:
                return folder
            budget -= found - allowed + room
        raise SdvinoError(f"{variant.name} takes {found} bytes, and {other.name} {allowed}.")

    def facts(self, variant: Variant) -> Facts:
        """Return what the variant's folder weighs; it is there already."""
        folder = ModelFolder.open(self._models / variant.model)
        history = () if folder.manifest is None else folder.manifest.passes
        passes = [entry for entry in history if entry["component"] == "unet"]
        tensors = open_tensors(weight_files(self.source(variant) / "unet"))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        parameters = sum(map(math.prod, shapes.values()))
        after = passes[-1]["after"] if passes else {}
        model = read_ir(folder.components["unet"].xml)
        size = weight_bytes(model)
        side = (folder.height // folder.vae_scale_factor, folder.width // folder.vae_scale_factor)
        fix_shapes(folder, "unet", model, *side)
        return Facts(
            parameters=after.get("parameters", parameters),
            nonzero=after.get("nonzero", parameters),
            operations=sum(layer.multiply_adds for layer in planned_layers("unet", model)),
            unet_bytes=size,
            bytes=sum(part.bytes for part in folder.components.values()),
            float_bytes=sum(
                part.bytes + missing_bytes(part.xml) for part in folder.components.values()
            ),
            rank_share=_rank_share(passes),
            bits=_bits(folder.components["unet"].xml.parent),
        )


def digest_of(source: Path) -> str:
    """Return what tells the weights, the scheduler and the suggestions of a source from others'."""
    files = sorted(path for path in source.rglob("*") if path.suffix in (".json", ".safetensors"))
    return hashed(" ".join(f"{file.relative_to(source)} {sha256_of(file)}" for file in files))


def unet_bytes(folder: Path) -> int:
    """Return the bytes of the UNet's constants in a converted folder."""
    return weight_bytes(read_ir(ModelFolder.open(folder).components["unet"].xml))


def missing_bytes(xml: Path) -> int:
    """Return what a graph's files would grow by with 32 bits for each number of its constants."""
    model = read_ir(xml)
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    numbers: int = sum(math.prod(op.get_output_shape(0)) for op in constants)
    return _F32 * numbers - weight_bytes(model)


def _rank_share(passes: Sequence[Mapping[str, Any]]) -> float | None:
    pairs = [
        rank / full
        for entry in passes
        for rank, full in entry["figures"].get("ranks_by_layer", {}).values()
    ]
    return sorted(pairs)[len(pairs) // 2] if pairs else None


def _bits(folder: Path) -> dict[str, int]:
    """Return how many layers of a component are stored in which bits, where it was by layer."""
    from sdvino.compress.local_report import PLAN_FILE

    plan = _read(folder / PLAN_FILE)
    counts: dict[str, int] = {}
    for layer in [] if plan is None else plan["layers"]:
        words = "16" if layer["coding"] is None else str(layer["coding"]["bits"])
        counts[words] = counts.get(words, 0) + 1
    return counts


def _made_elsewhere(folder: Path, recipe: str | Path) -> bool:
    """Tell whether scripts/measure_compression.py made ``folder`` of the same recipe."""
    if isinstance(recipe, Path) or recipe not in RECIPES or folder.with_suffix(".json").exists():
        return False
    manifest = ModelFolder.open(folder).manifest
    return manifest is not None and (manifest.source, manifest.recipe) == (SOURCE.name, recipe)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
