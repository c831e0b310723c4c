"""Recipes: how each component of a pipeline is stored, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from sdvino.compress.fragile import FRAGILE_LAYERS
from sdvino.compress.fragile import float_nodes as float_nodes
from sdvino.compress.passes import SourcePass, check_order
from sdvino.compress.prompts import check_prompts
from sdvino.errors import RequestError
from sdvino.settings import COMPONENTS, check_choice

#: fp16: half-precision weights, nothing quantized. int8-weights: weights in 8 bits, arithmetic in
#: float. int4-weights: weights of linears in 4 bits where they bear it, else in 8. int8-hybrid:
#: linears and embeddings as in int8-weights, convolutions as in int8. int8: weights and activations
#: in 8 bits (W8A8). global: 8 bits, one symmetric scale for each tensor, whatever is in it. local:
#: each layer's bits, granularity and range from its own numbers, under a budget of bytes.
Treatment = Literal[
    "fp16", "int8-weights", "int8-hybrid", "int8", "int4-weights", "global", "local"
]
RecipeName = Treatment
Granularity = Literal["tensor", "channel", "group"]

TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
DEFAULT_RECIPE: RecipeName = "int8"
#: Treatments that measure activations, and so need calibration inputs.
CALIBRATED: frozenset[Treatment] = frozenset({"int8-hybrid", "int8"})

#: Bits of a weight, the default first.
_BITS: Mapping[Treatment, tuple[int, ...]] = MappingProxyType(
    {
        "fp16": (16,),
        "int8-weights": (8,),
        "int8-hybrid": (8,),
        "int8": (8,),
        "int4-weights": (4,),
        "global": (8,),
        "local": (4, 8),
    }
)
# What NNCF and OpenVINO's plugins take: weight compression knows channels (and groups in 4 bits),
# quantization knows tensors and channels.
_GRANULARITIES: Mapping[Treatment, tuple[Granularity, ...]] = MappingProxyType(
    {
        "fp16": ("channel",),
        "int8-weights": ("channel",),
        "int8-hybrid": ("channel",),
        "int8": ("channel", "tensor"),
        "int4-weights": ("group", "channel"),
        "global": ("tensor",),
        "local": (),
    }
)
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
#: Of local: 4 bits for most layers, 8 and half precision for those that need them.
DEFAULT_BUDGET = 0.3
#: A budget between a share and this is a mistake: 30 for 30 %.
_FEWEST_BYTES = 1024
_GROUP_SIZES = (16, 32, 64, 128, 256)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
_IMAGES = ("unet", "vae_decoder", "vae_encoder", "tiny_vae")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecipe:
    """How one component is stored. Raises RequestError for choices that do not go together."""

    mode: Treatment
    #: Weights share a scale by tensor, by output channel, or (4 bits) by group within a channel.
    #: None: by channel, in global by tensor; local chooses for each layer.
    granularity: Granularity | None = None
    #: Weights in a group, for granularity group; a layer whose width it does not divide takes a
    #: smaller one, or stays in 8 bits.
    group_size: int | None = None
    #: Bits of a weight: 16 for fp16, 4 for int4-weights, else 8; local: the fewest of a layer, 4 or
    #: 8. None: what the mode says, 4 for local.
    bits: int | None = None
    #: int4-weights: the share of the linears' weights that goes to 4 bits, those first that bear it
    #: best (by the error of their weights; no data); the rest, convolutions, embeddings: 8 bits.
    ratio: float = 1.0
    #: Regular expressions, searched in the names of operations: what matches stays in float.
    float_layers: tuple[str, ...] = ()
    #: The first and the last layer stay in float.
    float_ends: bool = False
    #: Convolutions whose output is itself the residual of a block's sum stay in float (see
    #: `sdvino.compress.quantization.residual_sources`).
    float_residual_sources: bool = False
    #: int8: share of the range of activations that SmoothQuant moves into the weights of linears,
    #: 0 to 1 (arXiv:2211.10438); None: off.
    smooth_quant_alpha: float | None = None
    #: int8: the products of attention in 8 bits; None: where the target is faster with it.
    quantize_attention: bool | None = None
    #: local: what the weights may take: up to 1 a share of their bytes in half precision, above 1
    #: the bytes of the whole component. None: `DEFAULT_BUDGET`.
    budget: float | None = None
    #: local: how many groups of layers have their effect on the output measured; None: every layer
    #: by itself, groups of neighbours in large models; 0: none, weights alone decide.
    measured_groups: int | None = None
    #: global, local: activations in 8 bits too. None: in global they are, in local they are not.
    activations: bool | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, TREATMENTS)
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.bits is None:
            object.__setattr__(self, "bits", _BITS[self.mode][0])
        if self.granularity is None and self.mode != "local":
            granularity = "tensor" if self.mode == "global" else "channel"
            object.__setattr__(self, "granularity", granularity)
        for problem in self._problems():
            raise RequestError(problem)

    @property
    def calibrated(self) -> bool:
        """Whether compressing needs calibration inputs."""
        if self.mode == "local":
            return self.quantizes_activations or self.measured_groups != 0
        return self.mode in CALIBRATED or self.quantizes_activations

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are in 8 bits, by the recipe's mode or its choice."""
        if self.mode in ("global", "local"):
            return self.mode == "global" if self.activations is None else self.activations
        return self.mode in CALIBRATED

    @property
    def _has_w8a8(self) -> bool:
        return self.mode == "int8" or (self.mode == "local" and self.quantizes_activations)

    def _problems(self) -> Iterable[str]:
        mode, granularities = self.mode, _GRANULARITIES[self.mode]
        if self.bits not in _BITS[mode]:
            bits = " or ".join(map(str, _BITS[mode]))
            yield f"{mode} goes with bits = {bits}, not {self.bits}."
        if mode == "local" and self.granularity is not None:
            yield "local chooses each layer's granularity: leave granularity out."
        elif mode != "local" and self.granularity not in granularities:
            yield (
                f"{mode} goes with granularity {' or '.join(granularities)},"
                f" not {self.granularity}."
            )
        if (self.group_size is not None) != (self.granularity == "group"):
            yield "group_size belongs to granularity = 'group': give both, or neither."
        if self.group_size is not None and self.group_size not in _GROUP_SIZES:
            yield f"group_size is {self.group_size}; choose one of: {_listed(_GROUP_SIZES)}."
        if not 0.0 < self.ratio <= 1.0:
            yield f"ratio is {self.ratio:g}; give a share above 0 and up to 1."
        if self.ratio != 1.0 and mode != "int4-weights":
            yield f"ratio belongs to int4-weights, not {mode}."
        if self.smooth_quant_alpha is not None and not 0.0 <= self.smooth_quant_alpha <= 1.0:
            yield f"smooth_quant_alpha is {self.smooth_quant_alpha:g}; give a number from 0 to 1."
        if not self._has_w8a8 and self.smooth_quant_alpha is not None:
            yield f"smooth_quant_alpha belongs to int8, not {mode}."
        if not self._has_w8a8 and self.quantize_attention:
            yield f"quantize_attention belongs to int8, not {mode}."
        if mode != "local" and self.budget is not None:
            yield f"budget belongs to local, not {mode}."
        if mode != "local" and self.measured_groups is not None:
            yield f"measured_groups belongs to local, not {mode}."
        if mode not in ("global", "local") and self.activations is not None:
            yield f"activations belongs to global and local, not {mode}."
        if self.budget is not None and not (
            0.0 < self.budget <= 1.0 or _FEWEST_BYTES <= self.budget < math.inf
        ):
            yield (
                f"budget is {self.budget:g}; give a share of half precision's bytes, above 0 and up"
                f" to 1, or a number of bytes, {_FEWEST_BYTES} or more."
            )
        if self.measured_groups is not None and not 0 <= self.measured_groups <= 10_000:
            yield f"measured_groups is {self.measured_groups}; give a number from 0 to 10,000."
        for pattern in self.float_layers:
            if _compiled(pattern) is None:
                yield f"float_layers has {pattern!r}, which is no regular expression."


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
    #: Inputs of the UNet that are kept, spread over texts, timesteps and both branches of guidance.
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
    #: Devices it is made to run on (see `sdvino.compress.accelerate_row`); none: the target.
    devices: tuple[str, ...] = ()

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
                return replace(
                    milder,
                    calibration=self.calibration,
                    passes=self.passes,
                    devices=self.devices,
                )
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


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


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
            f"Unknown recipe {text!r}; choose one of: {_listed(RECIPES)}, or a .toml file."
        )
    return _TABLE[text]
