"""Weights and activations in 8 bits (W8A8): NNCF's post-training quantization.

NNCF quantizes a model with a copy of its weights in float32, packed once more by the CPU plugin,
and with what every quantized layer takes and gives at once: ten gigabytes for a UNet of 860 million
weights. But it looks at one layer at a time, so a large model is quantized in parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openvino as ov

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.fragile import float_nodes
from sdvino.compress.layers import (
    PRODUCTS,
    attention_nodes,
    embeddings,
    linears,
    nodes_with_weights,
    operations,
    residual_sources,
)
from sdvino.compress.parts import choose_ends
from sdvino.compress.quiet import quiet
from sdvino.compress.stepwise import PART_BYTES, Progress, Sample, compress_in_parts
from sdvino.compress.targets import Target
from sdvino.compress.weights import compress_linears
from sdvino.graph.upsampling import split_upsampling

#: `Target.overflow_fix` -> NNCF's OverflowFix.
_OVERFLOW = {"off": "DISABLE", "first-layer": "FIRST_LAYER", "all": "ENABLE"}


def quantize(
    component: str,
    model: ov.Model | Path,
    samples: Sequence[Sample],
    *,
    recipe: ComponentRecipe,
    target: Target,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
    scratch: Path | None = None,
    split_upsamples: bool = False,
) -> ov.Model:
    """Return ``model`` quantized as ``recipe`` (int8, int8-hybrid, global) says, for ``target``.

    ``samples`` are calibration inputs by tensor name; all are used, in order, so the result is
    the same each time. Weights get one scale for each output channel (or tensor), activations one
    for each tensor (symmetric weights; activations asymmetric, but for GPUs). Sums of a block and
    its residual stay in float: error 1.3 % against 2.1 % on the demo's VAE decoder, 3.5 % against
    12.4 % on its UNet (scripts/measure_choices.py).
    With ``split_upsamples``, convolutions of doubled pictures are rewritten before (see
    `sdvino.graph.upsampling`): fewer products, in layers of other names.
    ``progress`` is called with the share of the calibration passes done, 0 to 1. ``model`` is
    consumed; given as its .xml, weights are in memory only while they are worked on. A model for
    which NNCF would take more than ``part_bytes`` is quantized in parts; what flows between them
    is in the folder ``scratch`` (None: the system's) meanwhile.
    Raises RequestError when the recipe names layers that the model has not.
    Source: NNCF, "Post-training Quantization"; for int8-hybrid optimum-intel's hybrid quantization.
    """
    report: Progress = (lambda share: None) if progress is None else progress
    given: Callable[[], ov.Model] = (
        partial(ov.Core().read_model, model) if isinstance(model, Path) else model.clone
    )

    def read() -> ov.Model:
        found = given()
        if split_upsamples:
            split_upsampling(found)
        return found

    whole = read()
    method = _Method(recipe, target, tuple(_ignored(recipe, component, whole, target)))
    ends = choose_ends(whole, samples[0], part_bytes)
    if not ends:
        result = method.apply(whole, samples, report)
    else:
        del whole
        with tempfile.TemporaryDirectory(prefix="parts-", dir=scratch) as folder:
            result = compress_in_parts(read, ends, samples, method.apply, Path(folder), report)
    report(1.0)
    return result


@dataclass(frozen=True, slots=True)
class _Method:
    """How NNCF quantizes a model, or a part of it."""

    recipe: ComponentRecipe
    target: Target
    #: Names of the operations that stay in float, or as compressed as they are.
    ignored: tuple[str, ...]

    def apply(self, model: ov.Model, samples: Sequence[Sample], progress: Progress) -> ov.Model:
        """Return ``model`` quantized on ``samples``, its inputs. It is consumed."""
        recipe, here = self.recipe, set(operations(model))
        ignored = [name for name in self.ignored if name in here]
        if recipe.mode == "int8-hybrid":
            # Linears keep the names that they have; their weights are done with here.
            weights_only = linears(model)
            model = compress_linears(model, ignored) if _has_linears(model, ignored) else model
            ignored += weights_only
        if not _has_products(model, ignored):
            return model
        smooth = recipe.smooth_quant_alpha is not None and _has_linears(model, ignored)
        passes = (2 if smooth else 1) * len(samples)
        seen = 0

        def feed(index: int) -> dict[str, Any]:
            nonlocal seen
            seen += 1
            progress(min(0.99, seen / passes))
            return dict(samples[index])

        with quiet():
            import nncf

            return nncf.quantize(
                model,
                nncf.Dataset(range(len(samples)), feed),
                subset_size=len(samples),
                # For this type NNCF leaves sums alone and has SmoothQuant.
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=list(dict.fromkeys(ignored))),
                **_options(recipe, self.target, recipe.smooth_quant_alpha if smooth else None),
            )


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


def _has_products(model: ov.Model, ignored: Sequence[str]) -> bool:
    return any(
        op.get_type_name() in PRODUCTS and op.get_friendly_name() not in ignored
        for op in model.get_ops()
    )


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
