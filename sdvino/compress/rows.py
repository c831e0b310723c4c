"""The rows `quantize` and `accelerate` of a recipe's passes, as settings of their own.

A row is a table of TOML; `from_table` makes the settings of it, or says in one sentence what is
wrong. They stand alone, so that whoever reads recipes needs one line for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from sdvino.compress.recipes import (
    TREATMENTS,
    ComponentRecipe,
    Recipe,
    Treatment,
    get_recipe,
)
from sdvino.errors import RequestError
from sdvino.runtime.acceleration import Acceleration, accelerate
from sdvino.settings import COMPONENTS, check_choice

#: In the place of a component's name: every one.
EVERYTHING = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """The row `quantize`: how a component, or every one, is stored.

    Raises RequestError for an unknown scheme or component, and choices that do not go together.
    """

    #: global, local, or the name of another built-in recipe, such as int8.
    scheme: str = "int8"
    #: One of our components, such as unet or vae_decoder; or all.
    component: str = EVERYTHING
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
        check_choice("component", self.component, (EVERYTHING, *COMPONENTS))
        self.stored()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> QuantizeSettings:
        """Return the settings of a row, without its ``kind``."""
        made: QuantizeSettings = _from_table(cls, table, "quantize")
        return made

    def stored(self) -> Mapping[str, ComponentRecipe]:
        """Return the components that the row speaks of, and how each is stored."""
        if self.component == EVERYTHING:
            entries = dict(get_recipe(self.scheme).components)
        else:
            scheme: Treatment = next(mode for mode in TREATMENTS if mode == self.scheme)
            one = Recipe("one", "one").with_overrides({self.component: scheme})
            entries = {self.component: one.component(self.component)}
        chosen = {
            name: value
            for name in ("budget", "bits", "activations", "measured_groups")
            if (value := getattr(self, name)) is not None
        }
        return {
            # What a recipe leaves in another scheme (text encoders, in most) stays in it.
            name: dataclasses.replace(entry, **chosen) if entry.mode == self.scheme else entry
            for name, entry in entries.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelerateSettings:
    """The row `accelerate`: the device whose choices go into sdvino.json.

    Raises RequestError for what is no device's name.
    """

    #: A device, a list such as HETERO:GPU,CPU, or a kind of `sdvino.runtime.acceleration.TABLE`.
    device: str = "CPU"

    def __post_init__(self) -> None:
        self.resolve(())

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> AccelerateSettings:
        """Return the settings of a row, without its ``kind``."""
        made: AccelerateSettings = _from_table(cls, table, "accelerate")
        return made

    def resolve(self, isa: Collection[str]) -> Acceleration:
        """Return what pays there; CPU is the processor with the instruction sets ``isa``."""
        return accelerate(self.device, isa)


def _from_table(cls: Any, table: Mapping[str, Any], kind: str) -> Any:
    """Make the dataclass ``cls`` of a row, its keys and types checked."""
    fields = get_type_hints(cls)
    taken: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise RequestError(
                f"Unknown key {key!r} in the pass {kind}; it takes: {', '.join(fields)}."
            )
        taken[key] = _checked(f"{key} of the pass {kind}", value, str(fields[key]))
    try:
        return cls(**taken)
    except RequestError as error:
        raise RequestError(f"The pass {kind}: {error}") from error


def _checked(what: str, value: Any, hint: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if "bool" in hint:
        right, said = isinstance(value, bool), "true or false"
    elif "float" in hint:
        right, said = number, "a number"
    elif "int" in hint:
        right, said = number and isinstance(value, int), "a whole number"
    else:
        right, said = isinstance(value, str), "a string in quotes"
    if not right:
        raise RequestError(f"The {what} is {value!r}; write {said}.")
    return float(value) if "float" in hint else value
