"""Passes: the rows of a recipe, in the order in which they are done.

A row is a frozen dataclass, its fields the keys of the row in TOML::

    [[passes]]
    kind = "prune"
    component = "unet"
    method = "heads"
    share = 0.3

Passes of the level `source` change a component's weights, or what it consists of, before it is
exported; each is a step of the conversion. Passes of the level `storage` say how a component is
stored afterwards: they become its table in the recipe. Another kind is one class and one line in
`_KINDS`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from sdvino.errors import RequestError
from sdvino.inputs.patterns import compile_pattern
from sdvino.settings import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from sdvino.compress.component_recipe import ComponentRecipe
    from sdvino.nets.structure import Structure

Level = Literal["source", "storage"]
#: Called with the share done, 0 to 1.
Share: TypeAlias = "Callable[[float], None]"

#: Sub-folders of a source that passes can change.
SOURCE_COMPONENTS: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2", "vae")
#: Kind -> the module and the class of its row.
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "prune": "sdvino.train.prune:Prune",
        "low_rank": "sdvino.train.low_rank:LowRank",
        "distill": "sdvino.train.distillation.row:Distill",
        "quantize": "sdvino.compress.recipe_file:Quantize",
    }
)


@dataclass(slots=True)
class Outcome:
    """What a pass made of a component."""

    #: The torch module, changed in place, float32.
    module: Any
    #: How it differs from what its config.json describes.
    structure: Structure
    #: Figures for people and for sdvino.json: what JSON holds.
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The source as it was before any pass, for passes that learn from it."""

    #: Returns a component by its sub-folder, a torch module in float32, as it was.
    load: Callable[[str], Any]
    #: Folder of the tokenizer.
    tokenizer: Path
    #: Its scheduler_config.json.
    scheduler: Mapping[str, Any]
    #: What it suggests.
    guidance_scale: float
    #: What pictures of it are made of.
    prompts: tuple[str, ...]
    #: A folder that stays when the pass is interrupted, until the conversion ends.
    work: Path
    #: Tells the source from others, and what earlier passes made of it.
    key: str
    passed_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a pass is given beside its component."""

    #: Calls of the component, by argument name (see `sdvino.train.source_inputs`).
    inputs: Sequence[Mapping[str, NDArray[Any]]] = ()
    #: None where there is no source: of a module alone.
    origin: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass(ABC):
    """A row of a recipe. Raises RequestError for settings that cannot be."""

    kind: ClassVar[str]
    level: ClassVar[Level]

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        return self.kind

    def told(self) -> dict[str, Any]:
        """Return the settings for people and for JSON, without those that say nothing."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and name != "component"
        }

    def refusal(self, earlier: Pass) -> str | None:
        """Return why this pass cannot come after ``earlier``, or None when it can."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePass(Pass):
    """A pass over a component of the source, on torch modules."""

    level: ClassVar[Level] = "source"

    #: Sub-folder of the source: unet, text_encoder, text_encoder_2 or vae.
    component: str = "unet"

    def __post_init__(self) -> None:
        check_choice("component", self.component, SOURCE_COMPONENTS)

    @property
    def needs_inputs(self) -> bool:
        """Tell whether it measures activations on the pipeline's own inputs."""
        return False

    @property
    def needs_origin(self) -> bool:
        """Tell whether it learns from the source as it was before any pass."""
        return False

    def check(self, scheduler: Mapping[str, Any]) -> None:
        """Raise RequestError for what can be told to be wrong before anything is begun.

        ``scheduler`` is the source's scheduler_config.json.
        """
        return

    @property
    def evaluations(self) -> int:
        """Return how often the component is run, where that is what takes the time."""
        return 0

    def scheduler_after(self, scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the scheduler_config.json that what it makes is used with."""
        return scheduler

    def suggested_after(self) -> Mapping[str, Any]:
        """Return what it makes suggests in the source's place: steps, guidance, scheduler."""
        return {}

    def refusal(self, earlier: Pass) -> str | None:
        """Refuse to change weights that are stored already."""
        if earlier.level == "storage":
            return (
                f"{self.kind} works on the weights of the source, and after {earlier.kind} they"
                f" are stored already; move it before {earlier.kind}"
            )
        return None

    @abstractmethod
    def run(self, module: Any, structure: Structure, around: Context, progress: Share) -> Outcome:
        """Change ``module``, a torch module in float32 and eval mode, in place.

        ``structure`` is what earlier passes made of it; ``around`` has calls of it if
        `needs_inputs`. ``progress`` is called with the share done. Raises RequestError when the
        settings do not fit the module.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePass(Pass):
    """A pass that says how components are stored."""

    level: ClassVar[Level] = "storage"

    @abstractmethod
    def stored(self) -> Mapping[str, ComponentRecipe]:
        """Return the components that it speaks of, by our names, and how each is stored."""


def row_class(kind: object) -> type[Pass]:
    """Return the class of the rows of ``kind``; raises RequestError for an unknown one."""
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RequestError(f"Unknown pass {kind!r}; choose one of: {', '.join(_KINDS)}.")
    module, _, name = _KINDS[kind].partition(":")
    found: type[Pass] = getattr(import_module(module), name)
    return found


def check_order(passes: Sequence[Pass]) -> None:
    """Raise RequestError, with the reason, for passes that cannot work in this order."""
    for place, late in enumerate(passes):
        for earlier in passes[:place]:
            reason = late.refusal(earlier)
            if reason is not None:
                raise RequestError(f"Pass {place + 1} of the recipe cannot work there: {reason}.")


def check_share(name: str, value: float, *, open_end: bool = True) -> None:
    """Raise RequestError unless ``value`` is from 0 to below 1, or above 0 and up to 1."""
    if open_end and not 0.0 <= value < 1.0:
        raise RequestError(f"{name} is {value:g}; give a share from 0 to below 1.")
    if not open_end and not 0.0 < value <= 1.0:
        raise RequestError(f"{name} is {value:g}; give a share above 0 and up to 1.")


def compile_patterns(key: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Return the expressions compiled; raises RequestError for what is none."""
    return [_compile(key, pattern) for pattern in patterns]


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    compiled = compile_pattern(pattern)
    if compiled is None:
        raise RequestError(
            f"{key} has {pattern[:80]!r}, which is no regular expression, or one that repeats too"
            " much; correct it."
        )
    return compiled


def chosen(names: Sequence[str], keep: Sequence[str]) -> list[str]:
    """Return the ``names`` that match nothing in ``keep``, in order.

    Raises RequestError for an expression that matches no name, and when nothing is left.
    """
    left = list(names)
    for pattern in compile_patterns("keep", keep):
        if not any(pattern.search(name) for name in names):
            raise RequestError(
                f"keep has {pattern.pattern!r}, which matches no layer of this component; correct"
                " it or leave it out."
            )
        left = [name for name in left if not pattern.search(name)]
    if not left:
        raise RequestError("keep leaves no layer to work on; leave some of it out.")
    return left
