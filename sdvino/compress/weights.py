"""Weights in 8 or 4 bits, arithmetic in float: NNCF's weight compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openvino as ov

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.fragile import float_nodes
from sdvino.compress.layers import CONVOLUTIONS, embeddings, nodes_with_weights, operations
from sdvino.compress.quiet import quiet

#: Groups smaller than this store more scales than they save weights; such layers stay in 8 bits.
_SMALLEST_GROUP = 16


def compress_weights(component: str, model: ov.Model, recipe: ComponentRecipe) -> ov.Model:
    """Return ``model`` with its weights as ``recipe`` (int8-weights or int4-weights) says.

    8 bits: linears, convolutions and embeddings, one scale and zero point for each output channel.
    4 bits: the linears that bear it best by the error of their weights, up to the recipe's ratio,
    one scale and zero point for each group (or channel); the rest, convolutions, embeddings and
    the last linear: 8 bits. All is chosen from the weights alone: no data is needed and the same
    model always gives the same result. ``model`` is consumed.
    Raises RequestError when the recipe names layers that the model has not.
    Source: NNCF, "Weight Compression", modes INT8_ASYM and INT4_ASYM.
    """
    weighted, others = nodes_with_weights(model), embeddings(model)
    ignored = float_nodes(recipe, component, weighted, others, operations(model))
    with quiet():
        import nncf

        modes = nncf.CompressWeightsMode
        return nncf.compress_weights(
            model,
            mode=modes.INT4_ASYM if recipe.mode == "int4-weights" else modes.INT8_ASYM,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            **_four_bits(recipe),
        )


def compress_linears(model: ov.Model, ignored: Sequence[str]) -> ov.Model:
    """Put the weights of linears and embeddings of ``model`` into 8 bits, but for ``ignored``."""
    with quiet():
        import nncf

        scope = nncf.IgnoredScope(names=list(ignored), types=list(CONVOLUTIONS), validate=False)
        return nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=scope
        )


def _four_bits(recipe: ComponentRecipe) -> dict[str, Any]:
    if recipe.mode != "int4-weights":
        return {}
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedCompressionParameters,
        GroupSizeFallbackMode,
    )

    return {
        "ratio": recipe.ratio,
        "group_size": -1 if recipe.group_size is None else recipe.group_size,
        "sensitivity_metric": nncf.SensitivityMetric.WEIGHT_QUANTIZATION_ERROR,
        "backup_mode": nncf.BackupMode.INT8_ASYM,
        "advanced_parameters": AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST,
            min_adjusted_group_size=min(_SMALLEST_GROUP, recipe.group_size or _SMALLEST_GROUP),
        ),
    }
