"""Recipes: how each component of a pipeline is stored, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS, check_choice

#: fp16: half-precision weights, nothing quantized. int8-weights: weights in 8 bits, arithmetic in
#: float. int8: weights and activations in 8 bits (W8A8), fragile layers in float.
Treatment = Literal["fp16", "int8-weights", "int8"]
RecipeName = Literal["fp16", "int8-weights", "int8"]

TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
DEFAULT_RECIPE: RecipeName = "int8"

# Text encoders run once for each prompt and are all embeddings and linears: 8-bit weights give the
# whole saving in memory, and quantized activations would buy nothing worth their error.
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named choice of treatment for each component."""

    name: RecipeName
    #: What it does, for people: one line.
    summary: str
    default: Treatment
    #: Components that differ from the default.
    components: Mapping[str, Treatment] = field(default_factory=dict)
    #: Component to layers (names of operations) that stay in float beside the fragile ones.
    float_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def treatment(self, component: str) -> Treatment:
        """Return how ``component`` is stored."""
        return self.components.get(component, self.default)

    def with_overrides(self, overrides: Mapping[str, str]) -> Recipe:
        """Return the recipe with some components treated otherwise.

        Raises RequestError for a component or treatment that does not exist.
        """
        merged = dict(self.components)
        for component, treatment in overrides.items():
            check_choice("component", component, COMPONENTS)
            merged[component] = _treatment(treatment)
        return replace(self, components=MappingProxyType(merged))

    def with_float_layers(self, component: str, names: Iterable[str]) -> Recipe:
        """Return the recipe with these layers of ``component`` in float as well."""
        layers = dict.fromkeys([*self.float_layers.get(component, ()), *names])
        return replace(self, float_layers={**self.float_layers, component: tuple(layers)})

    def milder(self) -> Recipe | None:
        """Return the recipe that compresses less: int8 -> int8-weights -> fp16 -> None."""
        index = RECIPES.index(self.name)
        return _TABLE[RECIPES[index - 1]] if index else None


_TABLE: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fp16", "half-precision weights, nothing quantized", "fp16"),
            Recipe("int8-weights", "weights in 8 bits, arithmetic in float", "int8-weights"),
            Recipe(
                "int8",
                "weights and activations in 8 bits, fragile layers in float",
                "int8",
                MappingProxyType(dict.fromkeys(_TEXT_ENCODERS, "int8-weights")),
            ),
        )
    }
)


def get_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``; raises RequestError, naming the recipes, for another."""
    check_choice("recipe", name, RECIPES)
    return _TABLE[name]


def _treatment(name: str) -> Treatment:
    for known in TREATMENTS:
        if name == known:
            return known
    raise RequestError(f"Unknown precision {name!r}; choose one of: {', '.join(TREATMENTS)}.")
