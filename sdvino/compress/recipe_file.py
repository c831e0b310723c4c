"""Recipes as TOML: written for people to edit, read with every mistake named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sdvino.compress.component_recipe import TREATMENTS, ComponentRecipe
from sdvino.compress.passes import Pass, SourcePass, StoragePass, check_order, row_class
from sdvino.compress.recipes import CalibrationRecipe, Recipe, get_recipe
from sdvino.errors import RequestError
from sdvino.inputs.files import read_prompts, read_text
from sdvino.inputs.plain import NotPlain, parse_toml
from sdvino.settings import COMPONENTS, check_choice

_KINDS_OF_VALUES: Mapping[type, str] = {
    str: "a string",
    dict: "a table",
    list: "tables in double brackets",
}
#: A recipe file beyond this is none.
_MAX_BYTES = 2**20

_HEAD = """\
# A recipe of sdvino: how each component is stored. sdvino convert SOURCE FOLDER --recipe FILE
# A component that is not named stays in half precision. A key that is left out takes its default.
#
# mode                    fp16, int8-weights, int8-hybrid, int8, int4-weights, global or local
# granularity             weights share a scale by tensor (int8), channel or group (int4-weights)
# group_size              weights in a group: 16, 32, 64, 128 or 256
# bits                    of a weight: 16, 8 or 4, as the mode has it; local: the fewest, 4 or 8
# ratio                   int4-weights: share of the linears' weights in 4 bits, the least sensitive
#                         first; 1.0
# float_layers            regular expressions, searched in the names of operations: what stays in
#                         float; none
# float_ends              first and last layer in float; false
# float_residual_sources  convolutions whose output is a block's residual in float; false
# smooth_quant_alpha      int8: 0 to 1; without it SmoothQuant is off
# quantize_attention      int8: attention's products in 8 bits; without it --target decides
# budget                  local: up to 1 a share of the weights' bytes in half precision; above 1
#                         the component's bytes; 0.3
# measured_groups         local: groups of layers whose effect on the output is measured, 0 for none
# activations             global, local: activations in 8 bits too; global true, local false
#
# calibration: prompts, a list, or prompts_file, a name (the model's own); trajectories, how many
# of them are denoised; strata of timesteps, each denoised in one step; samples, inputs of the UNet
# that are kept (all by the size of the UNet); seed (0).
#
# [[passes]] are done to the source's weights first, in the order written:
#   kind = 'prune'     method magnitude, heads, channels or blocks; share to remove; scope, local
#                      (of each layer) or global; keep, regular expressions of layers left alone
#   kind = 'low_rank'  one of energy to keep, budget (share of the weights left) or rank; whiten,
#                      by what the layers are fed (true); keep
#   kind = 'distill'   objective recover, guidance, steps or consistency; iterations or minutes;
#                      batch, learning_rate, student_steps, ... ; prompts or pictures, a folder
#   kind = 'quantize'  scheme, a mode as above; component, or all: short for tables of components
# component is unet (the default), text_encoder, text_encoder_2 or vae.
"""
# What is written even where it is the default.
_ALWAYS = frozenset({"mode", "granularity", "bits", "float_layers", "seed"})
_CALIBRATION = "calibration"
_PROMPTS_FILE = "prompts_file"
_PASSES = "passes"
_PICTURES = "pictures"
#: More rows than this are no recipe.
_MOST_PASSES = 32


def to_toml(recipe: Recipe) -> str:
    """Return ``recipe`` as TOML, complete: what `from_toml` makes of it equals ``recipe``."""
    lines = [_HEAD, f"name = {_text(recipe.name)}", f"summary = {_text(recipe.summary)}"]
    for name in COMPONENTS:
        lines += ["", f"[{name}]", *_entries(recipe.component(name))]
    lines += ["", f"[{_CALIBRATION}]", *_entries(recipe.calibration)]
    for row in recipe.passes:
        lines += ["", f"[[{_PASSES}]]", f"kind = {_text(row.kind)}", *_entries(row)]
    return "\n".join(lines) + "\n"


def from_toml(text: str, *, name: str = "recipe", folder: Path | None = None) -> Recipe:
    """Return the recipe that ``text`` describes.

    ``name`` is for files that give none. ``folder`` is where a relative prompts_file, or folder of
    pictures, lies.
    Raises RequestError, one sentence, for anything that is not a recipe: what is no TOML, unknown
    keys and components, wrong types, and choices that do not go together.
    """
    table = _parse(text)
    keys: dict[str, type] = {"name": str, "summary": str, _CALIBRATION: dict, _PASSES: list}
    keys |= dict.fromkeys(COMPONENTS, dict)
    for key, value in table.items():
        if key not in keys:
            raise _unknown(key, keys, "a recipe")
        if not isinstance(value, keys[key]):
            kind = _KINDS_OF_VALUES[keys[key]]
            raise RequestError(f"The recipe's {key} is {value!r}; write {kind} there.")
    calibration = dict(table.get(_CALIBRATION, {}))
    if _PROMPTS_FILE in calibration:
        calibration["prompts"] = _prompts(calibration, folder)
    components = {key: _component(key, value) for key, value in table.items() if key in COMPONENTS}
    rows = _rows(table.get(_PASSES, []), folder)
    for row in rows:
        if isinstance(row, StoragePass):
            _add_stored(components, row)
    return Recipe(
        name=table.get("name", name),
        summary=table.get("summary", "a recipe of one's own"),
        components=components,
        calibration=_take(CalibrationRecipe, calibration, _CALIBRATION),
        passes=tuple(row for row in rows if isinstance(row, SourcePass)),
    )


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the file ``path``; raises RequestError, naming the file."""
    text = read_text(
        path,
        f"The recipe {path}",
        limit=_MAX_BYTES,
        error=RequestError,
        remedy="give a file such as `sdvino convert --show-recipe int8` prints",
    )
    try:
        return from_toml(text, name=_name_from(path), folder=path.parent)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        return parse_toml(text.encode("utf-8"))
    except NotPlain as error:
        raise RequestError(f"This is no TOML ({error}); correct it there.") from error
    except ImportError as error:
        raise RequestError(
            "Reading a recipe file with Python 3.10 needs tomli;"
            ' install it with: pip install "sdvino[convert]".'
        ) from error


def _rows(rows: list[Any], folder: Path | None) -> list[Pass]:
    """Return the passes that the rows describe, their order checked.

    A relative folder of pictures lies beside the recipe, in ``folder``.
    """
    if len(rows) > _MOST_PASSES:
        raise RequestError(f"The recipe has {len(rows)} passes; write up to {_MOST_PASSES}.")
    found = []
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "kind" not in row:
            raise RequestError(
                f"Pass {place} of the recipe has no kind; write one, such as kind = 'prune'."
            )
        values = {key: value for key, value in row.items() if key != "kind"}
        if folder is not None and isinstance(values.get(_PICTURES), str):
            values[_PICTURES] = str(_beside(folder, values[_PICTURES]).absolute())
        taken: Pass = _take(row_class(row["kind"]), values, f"passes {place}, {row['kind']}")
        found.append(taken)
    check_order(found)
    return found


def _add_stored(components: dict[str, ComponentRecipe], row: StoragePass) -> None:
    """Add what ``row`` says to the tables of components, which must not say something too."""
    for name, entry in row.stored().items():
        if name in components:
            raise RequestError(
                f"The recipe stores {name} by a table and by the pass {row.kind}; write one of the"
                " two."
            )
        components[name] = entry


def _component(name: str, values: Mapping[str, Any]) -> ComponentRecipe:
    if "mode" not in values:
        raise RequestError(f"[{name}] has no mode; write one, such as mode = 'int8-weights'.")
    entry: ComponentRecipe = _take(ComponentRecipe, values, name)
    return entry


def _take(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Make the dataclass ``cls`` of a table of TOML, its keys and types checked."""
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(cls)}
    known = [*kinds, _PROMPTS_FILE] if cls is CalibrationRecipe else [*kinds]
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown(key, known, f"[{where}]")
        if key != _PROMPTS_FILE:
            taken[key] = _value(f"[{where}] {key}", value, kinds[key])
    required = (entry.name for entry in dataclasses.fields(cls) if _has_no_default(entry))
    for key in required:
        if key not in taken:
            raise RequestError(f"[{where}] has no {key}; write it there.")
    try:
        return cls(**taken)
    except RequestError as error:
        raise RequestError(f"[{where}] {error}") from error


def _has_no_default(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _value(what: str, value: Any, kind: str) -> Any:
    """Return ``value`` as the annotation ``kind`` of a field has it."""
    if kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise RequestError(f"{what} is {value!r}; write a list of strings, such as ['a', 'b'].")
    for words, types, said in (
        ("bool", (bool,), "true or false"),
        ("int", (int,), "a whole number"),
        ("float", (int, float), "a number"),
    ):
        if kind.startswith(words):
            if isinstance(value, types) and (words == "bool" or not isinstance(value, bool)):
                return float(value) if words == "float" else value
            raise RequestError(f"{what} is {value!r}; write {said}.")
    if not isinstance(value, str):
        raise RequestError(f"{what} is {value!r}; write a string in quotes.")
    return value


def _prompts(calibration: dict[str, Any], folder: Path | None) -> list[str]:
    file = calibration.pop(_PROMPTS_FILE)
    if not isinstance(file, str) or "prompts" in calibration:
        raise RequestError("[calibration] takes prompts, a list, or prompts_file, a name: one.")
    return list(read_prompts(Path(file) if folder is None else _beside(folder, file)))


def _beside(folder: Path, name: str) -> Path:
    """Return the path of ``name``, which a recipe in ``folder`` gives: in that folder, or below.

    A recipe may be somebody else's, and what it names ends up in the model or its report.
    """
    path = folder / name
    inside = os.path.realpath(folder)
    if "\0" in name or not Path(os.path.realpath(path)).is_relative_to(inside):
        raise RequestError(
            f"The recipe names {name[:80]!r}, which lies outside of its folder; put it beside the"
            " recipe, and write its name alone."
        )
    return path


def _unknown(key: str, known: Iterable[str], where: str) -> RequestError:
    return RequestError(f"Unknown key {key!r} in {where}; it takes: {', '.join(known)}.")


def _entries(value: Any) -> Iterator[str]:
    """Yield the lines of a dataclass, without what says nothing: None, and rare keys' defaults."""
    for entry in dataclasses.fields(value):
        item = getattr(value, entry.name)
        if item is not None and (entry.name in _ALWAYS or item != entry.default):
            yield f"{entry.name} = {_toml_value(item)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple):
        if len(value) <= 1:
            return f"[{', '.join(map(_text, value))}]"
        return "[\n" + "".join(f"    {_text(item)},\n" for item in value) + "]"
    return repr(value)


def _text(value: str) -> str:
    """Return a TOML string: literal where it can be, which spares regular expressions escapes."""
    if value.isprintable() and "'" not in value:
        return f"'{value}'"
    # JSON's escapes are TOML's, but for the character it leaves and for halves of surrogate pairs.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _name_from(path: Path) -> str:
    """Return a name for the recipe of a file that gives none."""
    return re.sub(r"[^A-Za-z0-9 ._+-]", "-", path.stem).lstrip(" ._+-")[:64] or "recipe"


_EVERYTHING = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(StoragePass):
    """Store a component, or all, as the built-in recipe of that name does.

    Other finer choices are a component's table in the recipe, in the place of this row.
    """

    kind: ClassVar[str] = "quantize"

    #: global, local, or another built-in recipe: int8, int8-hybrid, int8-weights, int4-weights ...
    scheme: str = "int8"
    #: One of our components, such as unet or vae_decoder; or all.
    component: str = _EVERYTHING
    #: local: a share of half precision's bytes up to 1, or bytes (see `ComponentRecipe.budget`).
    budget: float | None = None
    #: local: the fewest bits of a weight, 4 or 8.
    bits: int | None = None
    #: global, local: activations in 8 bits too.
    activations: bool | None = None
    #: local: groups of layers whose effect on the output is measured; 0: none.
    measured_groups: int | None = None

    def __post_init__(self) -> None:
        check_choice("quantization scheme", self.scheme, TREATMENTS)
        check_choice("component", self.component, (_EVERYTHING, *COMPONENTS))
        self.stored()

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        return f"{self.kind} {self.scheme}"

    def refusal(self, earlier: Pass) -> str | None:
        """Refuse to store a component twice."""
        if isinstance(earlier, StoragePass) and set(self.stored()) & set(earlier.stored()):
            twice = next(name for name in self.stored() if name in earlier.stored())
            return f"{twice} is quantized already; write one quantize for it"
        return None

    def stored(self) -> Mapping[str, ComponentRecipe]:
        """Return the components that it speaks of, by our names, and how each is stored."""
        if self.component == _EVERYTHING:
            entries = get_recipe(self.scheme).components
        else:
            one = Recipe("one", "one").with_overrides({self.component: self.scheme})
            entries = {self.component: one.component(self.component)}
        chosen = {
            name: value
            for name in ("budget", "bits", "activations", "measured_groups")
            if (value := getattr(self, name)) is not None
        }
        return {
            # What a recipe leaves in another scheme (text encoders, in most) stays in it.
            name: replace(entry, **chosen) if entry.mode == self.scheme else entry
            for name, entry in entries.items()
        }
