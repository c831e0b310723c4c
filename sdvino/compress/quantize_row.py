"""The row `quantize` of a recipe: how components are stored after the other passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sdvino.compress.passes import Pass, StoragePass
from sdvino.compress.recipes import TREATMENTS, ComponentRecipe, Recipe, get_recipe
from sdvino.settings import COMPONENTS, check_choice

_EVERYTHING = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(StoragePass):
    """Store a component, or all, as the built-in recipe of that name does.

    Finer choices are a component's table in the recipe, in the place of this row.
    """

    kind: ClassVar[str] = "quantize"

    #: int8, int8-hybrid, int8-weights, int4-weights or fp16.
    scheme: str = "int8"
    #: One of our components, such as unet or vae_decoder; or all.
    component: str = _EVERYTHING

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
            return get_recipe(self.scheme).components
        entry = Recipe("one", "one").with_overrides({self.component: self.scheme})
        return {self.component: entry.component(self.component)}
