"""Recipes: how each component of a pipeline is stored, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from sdvino.compress.component_recipe import TREATMENTS, ComponentRecipe, Treatment, listed
from sdvino.compress.fragile import FRAGILE_LAYERS
from sdvino.compress.passes import SourcePass, check_order
from sdvino.compress.prompts import check_prompts
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS, check_choice

RecipeName = Treatment

RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
DEFAULT_RECIPE: RecipeName = "int8"
#: From the strongest compression to none: where the next milder recipe is looked for.
_MILDER: Mapping[str, RecipeName] = MappingProxyType(
    {
        "int8": "int8-hybrid",
        "int8-hybrid": "int8-weights",
        "int4-weights": "int8-weights",
        "int8-weights": "fp16",
        "global": "int8",
        "local": "int8-weights",
    }
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
_IMAGES = ("unet", "vae_decoder", "vae_encoder", "tiny_vae")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecipe:
    """What activations are measured on. None leaves the choice to the size of the UNet.

    See `sdvino.compress.calibration.make_plan`.
    """

    #: Texts; None: the source's calibration_prompts.txt, or a general list.
    prompts: tuple[str, ...] | None = None
    #: How many of the texts are denoised, evenly from the list.
    trajectories: int | None = None
    #: Strata of timesteps: a trajectory takes one step in each.
    strata: int | None = None
    #: Evaluations of the UNet that are looked at, spread over texts, timesteps and both branches of
    #: guidance. None: all, where activations are measured while pictures are drawn (int8 and
    #: int8-hybrid); else by the UNet's size.
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts is not None:
            check_prompts(self.prompts)
        for name, most in (("trajectories", 10_000), ("strata", 1_000), ("samples", 100_000)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise RequestError(f"{name} is {value}; give a whole number from 1 to {most:,}.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")


_FLOAT = ComponentRecipe(mode="fp16")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How every component is stored; what ``components`` leaves out stays in half precision."""

    #: What the manifest and every picture's metadata call it.
    name: str
    #: What it does, for people: one line.
    summary: str
    components: Mapping[str, ComponentRecipe] = field(default_factory=dict)
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    #: What is done to the source's weights first, in this order.
    passes: tuple[SourcePass, ...] = ()

    def __post_init__(self) -> None:
        check_order(self.passes)
        if _NAME.fullmatch(self.name) is None:
            raise RequestError(
                f"A recipe cannot be called {self.name!r}; take up to 64 letters, digits, spaces"
                " and . _ + -."
            )
        if not self.summary.isprintable() or len(self.summary) > 200:
            raise RequestError("A recipe's summary is one line of up to 200 characters.")
        for component in self.components:
            check_choice("component", component, COMPONENTS)
        full = {name: self.components.get(name, _FLOAT) for name in COMPONENTS}
        object.__setattr__(self, "components", MappingProxyType(full))

    def component(self, name: str) -> ComponentRecipe:
        """Return how the component ``name`` is stored, in full."""
        check_choice("component", name, COMPONENTS)
        return self.components[name]

    def treatment(self, component: str) -> Treatment:
        """Return how ``component`` is stored, in a word."""
        return self.component(component).mode

    def with_overrides(self, overrides: Mapping[str, str]) -> Recipe:
        """Return the recipe with some components treated as the built-in recipe of that name does.

        Raises RequestError for a component or treatment that does not exist.
        """
        merged = dict(self.components)
        for component, treatment in overrides.items():
            check_choice("component", component, COMPONENTS)
            check_choice("precision", treatment, TREATMENTS)
            merged[component] = _component(component, treatment)
        return replace(self, components=merged)

    def with_float_layers(self, component: str, names: Iterable[str]) -> Recipe:
        """Return the recipe with the operations of exactly these ``names`` in float as well."""
        old = self.component(component)
        added = (f"^{re.escape(name)}$" for name in names)
        layers = tuple(dict.fromkeys([*old.float_layers, *added]))
        return replace(
            self, components={**self.components, component: replace(old, float_layers=layers)}
        )

    def milder(self) -> Recipe | None:
        """Return the built-in recipe that compresses less than the strongest treatment here does.

        global -> int8 -> int8-hybrid -> int8-weights -> fp16 -> None. Calibration and passes stay.
        """
        order = ("global", "int8", "int8-hybrid", "int4-weights", "local", "int8-weights")
        for strongest in order:
            if any(entry.mode == strongest for entry in self.components.values()):
                milder = _TABLE[_MILDER[strongest]]
                return replace(milder, calibration=self.calibration, passes=self.passes)
        return None


def _component(name: str, treatment: str) -> ComponentRecipe:
    """Return how the built-in recipe called ``treatment`` would store the component ``name``.

    Text encoders take the treatment too, though the int8 recipes leave theirs at 8-bit weights.
    """
    recipe = _TABLE[treatment].component(name)
    if recipe.mode == treatment:
        return recipe
    if name in _TEXT_ENCODERS:
        raise RequestError(
            f"{name} cannot be stored as {treatment}: it runs once for each prompt, so quantized"
            f" activations buy nothing; choose {recipe.mode}, or fp16."
        )
    mode = next(mode for mode in TREATMENTS if mode == treatment)
    return ComponentRecipe(mode=mode)


def _everywhere(entry: ComponentRecipe, **others: ComponentRecipe) -> dict[str, ComponentRecipe]:
    return {**dict.fromkeys(COMPONENTS, entry), **others}


_WEIGHTS = ComponentRecipe(mode="int8-weights")
# Layers of 64 weights to a scale; layers narrower than that take what divides them. Of the linears'
# weights the fifth that 4 bits hurt most stays in 8.
_FOUR_BITS = ComponentRecipe(mode="int4-weights", granularity="group", group_size=64, ratio=0.8)
# Text encoders run once for each prompt and are all embeddings and linears: 8-bit weights give the
# whole saving in memory, and quantized activations would buy nothing worth their error.
_TEXT = dict.fromkeys(_TEXT_ENCODERS, _WEIGHTS)


def _quantized(mode: Treatment, alpha: float | None = None) -> dict[str, ComponentRecipe]:
    def entry(component: str) -> ComponentRecipe:
        return ComponentRecipe(
            mode=mode,
            float_layers=FRAGILE_LAYERS.get(component, ()),
            # AutoencoderTiny's decoder is a flat list of layers without names to go by.
            float_ends=component == "tiny_vae",
            # Only programs that compile with dynamic shapes need it, and they run no tiny decoder.
            float_residual_sources=component != "tiny_vae",
            smooth_quant_alpha=alpha,
        )

    return _TEXT | {component: entry(component) for component in _IMAGES}


def _global(component: str) -> ComponentRecipe:
    """Return the one scheme; text encoders are not calibrated, so only their weights take it."""
    if component in _TEXT_ENCODERS:
        return ComponentRecipe(mode="global", activations=False)
    return ComponentRecipe(mode="global", float_residual_sources=component != "tiny_vae")


_TABLE: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fp16", "half-precision weights, nothing quantized"),
            Recipe("int8-weights", "weights in 8 bits, arithmetic in float", _everywhere(_WEIGHTS)),
            Recipe(
                "int8-hybrid",
                "weights in 8 bits, convolutions with 8-bit activations too, linears in float",
                _quantized("int8-hybrid"),
            ),
            # SmoothQuant at 0.95: on the demo's UNet, unseen prompts, the error of the prediction
            # was 6.4 % without it and 6.3, 5.6 and 5.3 % at 0.5, 0.8 and 0.95.
            Recipe(
                "int8",
                "weights and activations in 8 bits, fragile layers in float",
                _quantized("int8", alpha=0.95),
            ),
            Recipe(
                "int4-weights",
                "linears' weights in 4 bits where they bear it, the rest in 8, arithmetic in float",
                _everywhere(
                    _WEIGHTS, text_encoder=_FOUR_BITS, text_encoder_2=_FOUR_BITS, unet=_FOUR_BITS
                ),
            ),
            Recipe(
                "global",
                "8 bits everywhere, one symmetric scale for each tensor: simple, and the least"
                " faithful",
                {component: _global(component) for component in COMPONENTS},
            ),
            Recipe(
                "local",
                "the UNet's layers in 4, 8 or 16 bits, each as its own measured error allows",
                _everywhere(_WEIGHTS, unet=ComponentRecipe(mode="local")),
            ),
        )
    }
)


def get_recipe(name: str | Path) -> Recipe:
    """Return the built-in recipe called ``name``, or the one in the TOML file of that name.

    Raises RequestError, naming the recipes, for another name, and for a file that is no recipe.
    """
    text = str(name)
    if isinstance(name, Path) or text.lower().endswith(".toml"):
        from sdvino.compress.recipe_file import read_recipe

        return read_recipe(Path(name))
    if text not in _TABLE:
        raise RequestError(
            f"Unknown recipe {text!r}; choose one of: {listed(RECIPES)}, or a .toml file."
        )
    return _TABLE[text]
