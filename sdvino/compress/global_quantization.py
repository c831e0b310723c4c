"""Global quantization: one scheme for all parameters, whatever is in them.

8 bits, symmetric, one scale for each tensor of weights and of activations. It is what the simplest
hardware takes, and the measure of what choosing for each layer is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import openvino as ov

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.fragile import float_nodes
from sdvino.compress.layers import embeddings, nodes_with_weights, operations
from sdvino.compress.quantization import quantize
from sdvino.compress.statistics import Statistics
from sdvino.compress.stepwise import Sample
from sdvino.compress.targets import Target
from sdvino.compress.weight_coding import Coding
from sdvino.compress.weight_graph import find, put_encoded, weight_layers

#: The one scheme, as far as weights are concerned.
SCHEME = Coding(bits=8, granularity="tensor", symmetric=True)


def quantize_global(
    component: str,
    model: ov.Model,
    samples: Statistics | Sequence[Sample] = (),
    *,
    recipe: ComponentRecipe,
    target: Target,
    progress: Callable[[float], None] | None = None,
) -> ov.Model:
    """Return ``model`` with all weights, and activations where ``recipe`` has them, in the scheme.

    Embeddings have no activations to quantize, and only their weights take it. ``samples`` are
    calibration inputs by tensor name, which activations need. ``model`` is consumed. Raises
    RequestError when the recipe names layers that the model has not.
    """
    if recipe.quantizes_activations:
        kept = {*nodes_with_weights(model)}
        model = quantize(component, model, samples, recipe=recipe, target=target, progress=progress)
    else:
        kept = set()
    ignored = float_nodes(
        recipe, component, nodes_with_weights(model), embeddings(model), operations(model)
    )
    nodes = find(model)
    for layer in weight_layers(model, {*kept, *ignored}):
        put_encoded(nodes[layer.name], layer, SCHEME)
    model.validate_nodes_and_infer_types()
    if progress is not None:
        progress(1.0)
    return model
