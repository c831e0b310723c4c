"""Local quantization: every layer's bits, granularity and range from its own numbers.

See `sdvino.compress.local_plan` for how the choice is made; here the numbers are taken from a
graph, and the choice is put into it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import openvino as ov

from sdvino.compress.component_recipe import DEFAULT_BUDGET, ComponentRecipe
from sdvino.compress.float_layers import group_layers
from sdvino.compress.fragile import float_nodes, fragile_nodes
from sdvino.compress.layers import embeddings, nodes_with_weights, operations
from sdvino.compress.local_plan import (
    Candidate,
    LayerFacts,
    LocalPlan,
    choose,
    codings,
    effects_of,
    in_half,
)
from sdvino.compress.quantization import quantize
from sdvino.compress.sensitivity import Sample, run_model
from sdvino.compress.targets import Target
from sdvino.compress.weight_coding import Coding, describe, encode, squared_error
from sdvino.compress.weight_graph import (
    WeightLayer,
    put_encoded,
    put_values,
    read_weights,
    weight_bytes,
    weight_layers,
)
from sdvino.graph.walk import by_name
from sdvino.weights.numbers import mean_relative_error

Progress = Callable[[float], None]

#: How the effect of a layer is measured: its weights rounded so, which is far above the noise.
REFERENCE = Coding(bits=4, granularity="channel")
# Compiling and running a component of Stable Diffusion's size takes half a minute on a laptop, one
# of the demo's size less than a second.
_LARGE_BYTES = 200_000_000
_LARGE_GROUPS, _LARGE_SAMPLES = 48, 2
_SMALL_GROUPS, _SMALL_SAMPLES = 1_000, 4
#: Shares of the whole that looking at the weights and measuring take.
_LOOKING, _MEASURING = 0.25, 0.9


@dataclass(frozen=True, slots=True)
class Effects:
    """What an error in a layer's weights does to the output; empty: every layer counts alike."""

    #: By the layer's name; see `LayerFacts.effect`.
    by_layer: Mapping[str, float] = field(default_factory=dict)
    #: Inputs that were run.
    measured_on: int = 0

    def of(self, layer: str) -> float:
        """Return the effect of a layer."""
        return self.by_layer[layer] if self.measured_on else 1.0


def quantize_local(
    component: str,
    model: ov.Model,
    samples: Sequence[Sample] = (),
    *,
    recipe: ComponentRecipe,
    target: Target,
    effects: Effects | None = None,
    progress: Progress | None = None,
) -> tuple[ov.Model, LocalPlan]:
    """Return ``model`` quantized layer by layer as ``recipe`` (local) says, and the choices.

    Where the recipe has activations in 8 bits, they and the weights of layers of 8 bits are
    quantized by NNCF for ``target``, one scale for a channel; other layers compute in float, and so
    do the fragile ones (`sdvino.compress.fragile`), whatever the bits of their weights.
    ``effects`` are what `measure` found before; None measures here. ``model`` is consumed. Raises
    RequestError for a budget that nothing can meet, and for layers that the model has not.
    """
    show = progress if progress is not None else _silent
    ignored = float_nodes(
        recipe, component, nodes_with_weights(model), embeddings(model), operations(model)
    )
    activations = recipe.quantizes_activations
    in_float = fragile_nodes(component, nodes_with_weights(model)) if activations else ()
    plan = plan_local(
        component,
        model,
        samples,
        budget=DEFAULT_BUDGET if recipe.budget is None else recipe.budget,
        bits=4 if recipe.bits is None else recipe.bits,
        groups=recipe.measured_groups,
        activations=activations,
        in_float=in_float,
        ignored=ignored,
        effects=effects,
        progress=lambda share: show((0.5 if activations else 1.0) * share),
    )
    integer = _in_integers(plan, in_float) if activations else []
    model = apply_plan(model, plan, left=integer)
    if activations:
        floats = {choice.facts.layer.name for choice in plan.layers}.difference(integer)
        model = quantize(
            component,
            model,
            samples,
            recipe=_for_activations(recipe, [*ignored, *sorted(floats)]),
            target=target,
            progress=lambda share: show(0.5 + 0.5 * share),
        )
    show(1.0)
    return model, plan


def _in_integers(plan: LocalPlan, in_float: Collection[str]) -> list[str]:
    """Return the layers that compute in 8 bits: of 8-bit weights, and not to be ``in_float``."""
    eight = (c for c in plan.layers if c.taken.coding is not None and c.taken.coding.bits == 8)
    return [choice.facts.layer.name for choice in eight if choice.facts.layer.name not in in_float]


def _for_activations(recipe: ComponentRecipe, kept: Sequence[str]) -> ComponentRecipe:
    """Return how what is to compute in 8 bits is quantized, without the layers ``kept``."""
    return ComponentRecipe(
        mode="int8",
        float_layers=tuple(f"^{re.escape(name)}$" for name in kept),
        float_residual_sources=recipe.float_residual_sources,
        smooth_quant_alpha=recipe.smooth_quant_alpha,
        quantize_attention=recipe.quantize_attention,
    )


def _silent(share: float) -> None:
    """Show nothing."""


def plan_local(
    component: str,
    model: ov.Model,
    samples: Sequence[Sample] = (),
    *,
    budget: float,
    bits: int = 4,
    groups: int | None = None,
    activations: bool = False,
    in_float: Collection[str] = (),
    ignored: Collection[str] = (),
    effects: Effects | None = None,
    progress: Progress = lambda share: None,
) -> LocalPlan:
    """Return how each layer of the float ``model`` is best stored within ``budget``.

    ``budget`` as in `sdvino.compress.local_plan.budget_bytes`; ``bits``: 8, or 4 for 8 and 4.
    ``samples`` and ``groups``: see `measure`, whose ``effects`` may be given instead. Without
    effects every layer counts by the error of its weights alone. ``activations``: layers of 8 bits
    compute in integers, but for those ``in_float``. ``ignored`` names operations that stay as they
    are. ``model`` is not changed. The same input gives the same plan. Raises RequestError for a
    budget that nothing can meet.
    """
    layers = weight_layers(model, ignored)
    nodes = by_name(model)
    facts = []
    for index, layer in enumerate(layers):
        integers = activations and layer.name not in in_float
        facts.append(_look(nodes[layer.name], layer, bits=bits, activations=integers))
        progress(_LOOKING * (index + 1) / len(layers))
    fixed = weight_bytes(model) - sum(in_half(layer).bytes for layer in layers)
    choose(component, facts, budget, fixed=fixed)  # says so at once where nothing fits
    if effects is None:
        effects = measure(
            model,
            samples,
            groups=groups,
            ignored=ignored,
            progress=lambda share: progress(_LOOKING + (_MEASURING - _LOOKING) * share),
        )
    facts = [replace(entry, effect=effects.of(entry.layer.name)) for entry in facts]
    return choose(component, facts, budget, fixed=fixed, measured_on=effects.measured_on)


def measure(
    model: ov.Model,
    samples: Sequence[Sample],
    *,
    groups: int | None = None,
    ignored: Collection[str] = (),
    progress: Progress = lambda share: None,
) -> Effects:
    """Return what an error in each layer's weights does to the output of the float ``model``.

    ``samples`` are the component's calibration inputs, by tensor name, all of one shape: a few,
    evenly, are run with the weights of one layer at a time rounded, of ``groups`` of neighbours
    where the model is large (None: by its size; 0: not at all).
    """
    layers = weight_layers(model, ignored)
    large = weight_bytes(model) >= _LARGE_BYTES
    if groups is None:
        groups = _LARGE_GROUPS if large else _SMALL_GROUPS
    used = _evenly(samples, _LARGE_SAMPLES if large else _SMALL_SAMPLES)
    if not (used and groups and layers):
        return Effects()
    found = measure_effects(model, layers, used, groups=groups, progress=progress)
    return Effects(found, measured_on=len(used))


def measure_effects(
    model: ov.Model,
    layers: Sequence[WeightLayer],
    samples: Sequence[Sample],
    *,
    groups: int,
    progress: Progress = lambda share: None,
) -> dict[str, float]:
    """Return what an error in each layer's weights does to the output (`LayerFacts.effect`).

    At most ``groups`` are measured: layers by themselves where there is room, else neighbours
    together. ``samples`` are inputs by tensor name, all of one shape.
    """
    named = {layer.name: layer for layer in layers}
    expected = run_model(model, samples)
    errors: dict[tuple[str, ...], float] = {}
    rounded: dict[str, float] = {}
    parts = group_layers(list(named), groups)
    for index, names in enumerate(parts.values()):
        changed = model.clone()
        nodes = by_name(changed)
        for name in names:
            layer = named[name]
            matrix = read_weights(nodes[name], layer)
            values = encode(matrix, REFERENCE).decode(matrix.shape)
            rounded[name] = _squared(values - matrix) / max(_squared(matrix), 1e-30)
            put_values(nodes[name], layer, values)
        found = run_model(changed, samples)
        errors[names] = mean_relative_error(found, expected)
        del changed, nodes, found
        gc.collect()
        progress((index + 1) / len(parts))
    return effects_of(errors, rounded)


def apply_plan(model: ov.Model, plan: LocalPlan, *, left: Collection[str] = ()) -> ov.Model:
    """Write the weights of ``model`` as ``plan`` says, in place; returns it.

    Layers named in ``left`` stay as they are, for NNCF to quantize with what they read.
    """
    nodes, left = by_name(model), frozenset(left)
    for choice in plan.layers:
        layer, coding = choice.facts.layer, choice.taken.coding
        if coding is not None and layer.name not in left:
            put_encoded(nodes[layer.name], layer, coding)
    model.validate_nodes_and_infer_types()
    return model


def _look(op: ov.Node, layer: WeightLayer, *, bits: int, activations: bool) -> LayerFacts:
    """Return the distribution of a layer's weights, and what each coding would do to them."""
    matrix = read_weights(op, layer)
    found = describe(matrix)
    tried = codings(layer, found, bits=bits, activations=activations)
    candidates = [
        Candidate(
            coding=coding,
            bytes=coding.bytes(layer.rows, layer.width),
            error=squared_error(matrix, coding),
        )
        for coding in tried
    ]
    return LayerFacts(layer=layer, distribution=found, candidates=(*candidates, in_half(layer)))


def _evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return ``most`` of the samples, or all, evenly from the list."""
    count = min(most, len(samples))
    return [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)]


def _squared(values: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
