"""Weights and activations in 8 bits (W8A8): NNCF's post-training quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.layers import (
    attention_nodes,
    embeddings,
    linears,
    nodes_with_weights,
    operations,
    residual_sources,
)
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import ComponentRecipe, float_nodes
from sdvino.compress.targets import Target
from sdvino.compress.weights import compress_linears

Sample = Mapping[str, NDArray[Any]]

#: `Target.overflow_fix` -> NNCF's OverflowFix.
_OVERFLOW = {"off": "DISABLE", "first-layer": "FIRST_LAYER", "all": "ENABLE"}


def quantize(
    component: str,
    model: ov.Model,
    samples: Sequence[Sample],
    *,
    recipe: ComponentRecipe,
    target: Target,
    progress: Callable[[float], None] | None = None,
) -> ov.Model:
    """Return ``model`` quantized as ``recipe`` (int8, int8-hybrid, global) says, for ``target``.

    ``samples`` are calibration inputs by tensor name; all are used, in order, so the result is
    the same each time. Weights get one scale for each output channel (or tensor), activations one
    for each tensor (symmetric weights; activations asymmetric, but for GPUs). Sums of a block and
    its residual stay in float: on the demo's VAE decoder, error 1.5 % against 2.3 %.
    ``progress`` is called with the share of the calibration passes done, 0 to 1. ``model`` is
    consumed. Raises RequestError when the recipe names layers that the model has not.
    Source: NNCF, "Post-training Quantization"; for int8-hybrid optimum-intel's hybrid quantization.
    """
    ignored = _ignored(recipe, component, model, target)
    if recipe.mode == "int8-hybrid":
        # Linears keep the names that they have; their weights are done with here.
        weights_only = linears(model)
        model = compress_linears(model, ignored) if _has_linears(model, ignored) else model
        ignored += weights_only
    smooth = recipe.smooth_quant_alpha is not None and _has_linears(model, ignored)
    passes = (2 if smooth else 1) * len(samples)
    seen = 0

    def feed(sample: Sample) -> dict[str, NDArray[Any]]:
        nonlocal seen
        seen += 1
        if progress is not None:
            progress(min(0.99, seen / passes))
        return dict(sample)

    with quiet():
        import nncf

        result = nncf.quantize(
            model,
            nncf.Dataset(list(samples), feed),
            subset_size=len(samples),
            # For this type NNCF leaves sums alone and has SmoothQuant.
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(dict.fromkeys(ignored))),
            **_options(recipe, target, recipe.smooth_quant_alpha if smooth else None),
        )
    if progress is not None:
        progress(1.0)
    return result


def _ignored(recipe: ComponentRecipe, component: str, model: ov.Model, target: Target) -> list[str]:
    """Return the names of what stays in float, or as compressed as it is."""
    attention = attention_nodes(model)
    weighted = nodes_with_weights(model)
    others = [*embeddings(model), *attention]
    ignored = float_nodes(recipe, component, weighted, others, operations(model))
    if recipe.float_residual_sources:
        ignored += residual_sources(model)
    wanted = recipe.quantize_attention
    if wanted is None:
        wanted = recipe.mode == "int8" and target.quantize_attention
    return ignored if wanted else [*ignored, *attention]


def _has_linears(model: ov.Model, ignored: Sequence[str]) -> bool:
    return bool(set(linears(model)) - set(ignored))


def _options(recipe: ComponentRecipe, target: Target, alpha: float | None) -> dict[str, Any]:
    """Return NNCF's parameters for the recipe's choices and the target's."""
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
    )

    presets = nncf.QuantizationPreset
    devices = nncf.TargetDevice
    return {
        "preset": presets.PERFORMANCE if target.symmetric_activations else presets.MIXED,
        "target_device": devices.GPU if target.name == "gpu" else devices.ANY,
        "advanced_parameters": AdvancedQuantizationParameters(
            overflow_fix=getattr(nncf.OverflowFix, _OVERFLOW[target.overflow_fix]),
            smooth_quant_alphas=AdvancedSmoothQuantParameters(
                matmul=-1 if alpha is None else alpha, convolution=-1
            ),
            weights_quantization_params=(
                _one_scale(symmetric=recipe.mode == "global")
                if recipe.granularity == "tensor"
                else None
            ),
            activations_quantization_params=(
                _one_scale(symmetric=True) if recipe.mode == "global" else None
            ),
        ),
    }


def _one_scale(*, symmetric: bool) -> Any:
    """Return NNCF's parameters for one scale over a tensor."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import QuantizationParameters

    return QuantizationParameters(
        per_channel=False, mode=QuantizationScheme.SYMMETRIC if symmetric else None
    )
