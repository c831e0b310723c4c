"""What is asked of a conversion, as plain data: it travels to the worker processes as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdvino.compress.calibration import CalibrationPlan
from sdvino.compress.recipes import Recipe, get_recipe
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import SdvinoError

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one conversion. Every field is something that JSON holds."""

    #: Absolute path of the source.
    source: str
    #: Name of the recipe, and exceptions from it: component -> precision.
    recipe: str
    components: Mapping[str, str]
    #: Prompts to calibrate on; None: the source's own, or a general list.
    prompts: tuple[str, ...] | None = None
    #: num_inference_steps, guidance_scale, scheduler.
    suggested: Mapping[str, Any] | None = None
    #: The model's name in the manifest; None: the source's.
    name: str | None = None

    def open_source(self, work: Path) -> DiffusersFolder:
        """Open the source, checked, with whatever is put in the place of its parts.

        What has to be unpacked goes to ``work``/source, once: workers open the source again.
        Raises RequestError for a source that is none.
        """
        return DiffusersFolder.open(Path(self.source))

    def resolve_recipe(self) -> Recipe:
        """Return the recipe with its exceptions; raises RequestError for unknown names."""
        return get_recipe(self.recipe).with_overrides(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPlan:
    """What the worker processes read: the request, and what was decided from it."""

    request: Request
    recipe: Recipe
    calibration: CalibrationPlan
    #: Our names of the components, in order.
    components: tuple[str, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Return the components that need calibration inputs."""
        return tuple(name for name in self.components if self.recipe.treatment(name) == "int8")

    def open_source(self, work: Path) -> DiffusersFolder:
        """Open the source as the request does."""
        return self.request.open_source(work)

    def write(self, folder: Path) -> None:
        """Write ``folder``/plan.json."""
        value = {
            "request": to_plain(asdict(self.request)),
            "recipe": recipe_to_plain(self.recipe),
            "calibration": to_plain(asdict(self.calibration)),
            "components": list(self.components),
        }
        text = json.dumps(value, indent=1)
        (folder / PLAN_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> WorkPlan:
        """Read what `write` wrote."""
        value = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return cls(
            request=_from_plain(Request, value["request"]),
            recipe=recipe_from_plain(value["recipe"]),
            calibration=_from_plain(CalibrationPlan, value["calibration"]),
            components=tuple(value["components"]),
        )


def recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as what JSON holds."""
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "default": recipe.default,
        "components": dict(recipe.components),
    }


def recipe_from_plain(value: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `recipe_to_plain` took apart."""
    components = MappingProxyType(dict(value["components"]))
    return Recipe(value["name"], value["summary"], value["default"], components)


def to_plain(value: Any) -> Any:
    """Return ``value`` with tuples and mappings as JSON has them: lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise SdvinoError(f"A {type(value).__name__} cannot be handed to a worker process.")


def _from_plain(cls: Any, value: Mapping[str, Any]) -> Any:
    """Return the dataclass; its sequences are tuples."""
    known = {field.name for field in fields(cls)}
    return cls(
        **{
            key: tuple(item) if isinstance(item, list) else item
            for key, item in value.items()
            if key in known
        }
    )
