"""The row `quantize` of a recipe: how components are stored after the other passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from sdvino.compress.component_recipe import TREATMENTS, ComponentRecipe
from sdvino.compress.passes import Pass, StoragePass
from sdvino.compress.recipes import Recipe, get_recipe
from sdvino.settings import COMPONENTS, check_choice

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
