"""Weights in 8 or 4 bits, and activations in 8 bits too (W8A8): NNCF's compression.

What activations are like is known before (see `sdvino.compress.statistics`), so that nothing is
evaluated here. NNCF takes the weights that it works on in float32; but it looks at one layer at a
time, so a large model is quantized in parts.

Global quantization is one scheme for all parameters: 8 bits, symmetric, one scale for each tensor
of weights and of activations. It is what the simplest hardware takes, and the measure of what
choosing for each layer is worth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openvino as ov

from sdvino.compress.bias_correction import correct_biases, float_layers
from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.fragile import float_nodes
from sdvino.compress.layers import (
    CONVOLUTIONS,
    PRODUCTS,
    attention_nodes,
    embeddings,
    linears,
    nodes_with_weights,
    operations,
    residual_sources,
)
from sdvino.compress.parts import choose_ends
from sdvino.compress.post_training import apply_nncf
from sdvino.compress.quiet import quiet
from sdvino.compress.statistics import Recorder, Statistics, fix_shapes
from sdvino.compress.stepwise import (
    PART_BYTES,
    Evaluator,
    Progress,
    Sample,
    compress_in_parts,
)
from sdvino.compress.targets import Target
from sdvino.compress.weight_coding import Coding
from sdvino.compress.weight_graph import put_encoded, weight_layers
from sdvino.graph.cut import Value
from sdvino.graph.upsampling import split_upsampling
from sdvino.graph.walk import by_name

#: `Target.overflow_fix` -> NNCF's OverflowFix.
OVERFLOW = {"off": "DISABLE", "first-layer": "FIRST_LAYER", "all": "ENABLE"}
#: Share of the progress that evaluating samples is.
_MEASURING = 0.7


def quantize(
    component: str,
    model: ov.Model | Path,
    calibration: Statistics | Sequence[Sample],
    *,
    recipe: ComponentRecipe,
    target: Target,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
    scratch: Path | None = None,
    split_upsamples: bool = False,
) -> ov.Model:
    """Return ``model`` quantized as ``recipe`` (int8, int8-hybrid, global) says, for ``target``.

    ``calibration`` are the statistics of its activations, or inputs by tensor name, which are
    evaluated for them. Weights get one scale for each output channel (or tensor), activations one
    for each tensor (symmetric weights; activations asymmetric, but for GPUs). Sums of a block and
    its residual stay in float: error 1.3 % against 2.1 % on the demo's VAE decoder, 3.5 % against
    12.4 % on its UNet (scripts/measure_choices.py).
    With ``split_upsamples``, convolutions of doubled pictures are rewritten before (see
    `sdvino.graph.upsampling`): fewer products, in layers of other names; statistics are of those.
    ``progress`` is called with the share done, 0 to 1. ``model`` is consumed; given as its .xml,
    weights are in memory only while they are worked on. A model for which NNCF would take more than
    ``part_bytes`` is quantized in parts; they are in the folder ``scratch`` (None: the system's)
    meanwhile.
    Raises RequestError when the recipe names layers that the model has not, SdvinoError when the
    statistics are not of this model.
    Source: NNCF, "Post-training Quantization"; for int8-hybrid optimum-intel's hybrid quantization.
    """
    report: Progress = (lambda share: None) if progress is None else progress
    read = _reader(model, split_upsamples)
    whole = read()
    ignored = tuple(_ignored(recipe, component, whole, target))
    with tempfile.TemporaryDirectory(prefix="parts-", dir=scratch) as folder:
        measured = 0.0
        if not isinstance(calibration, Statistics):
            measured = _MEASURING
            path = Path(folder) / "statistics.bin"
            calibration = measure(
                read(), calibration, path, lambda share: report(_MEASURING * share), part_bytes
            )
        method = _Method(recipe, target, ignored, calibration)
        ends = choose_ends(whole, {}, part_bytes)
        if not ends:
            result = method.apply(whole, {})
        else:
            del whole
            result = compress_in_parts(
                read,
                ends,
                method.apply,
                Path(folder),
                lambda share: report(measured + (1 - measured) * share),
            )
    report(1.0)
    return result


def _reader(model: ov.Model | Path, split_upsamples: bool) -> Callable[[], ov.Model]:
    """Return what gives the model anew, its upsampling split where that is asked for."""
    given: Callable[[], ov.Model] = (
        partial(ov.Core().read_model, model) if isinstance(model, Path) else model.clone
    )
    if isinstance(model, ov.Model):
        # Values are known by names, and clones have others where nobody gave one.
        for operation in model.get_ops():
            operation.set_friendly_name(operation.get_friendly_name())

    def read() -> ov.Model:
        found = given()
        if split_upsamples:
            split_upsampling(found)
        return found

    return read


def measure(
    model: ov.Model,
    samples: Sequence[Sample],
    path: Path,
    progress: Progress = lambda share: None,
    part_bytes: int = PART_BYTES,
) -> Statistics:
    """Evaluate ``model`` on ``samples``; return what its activations are like, kept in ``path``.

    All samples have the same shapes. ``model`` is consumed. Of one that would take more than
    ``part_bytes`` only a part is in memory at a time.
    """
    fix_shapes(model, samples[0])
    recorder = Recorder(path)
    evaluator = Evaluator(model, choose_ends(model, samples[0], part_bytes), recorder=recorder)
    with tempfile.TemporaryDirectory(prefix="flow-", dir=path.parent) as folder:
        evaluator.evaluate(samples, Path(folder), progress=progress)
    return recorder.close()


@dataclass(frozen=True, slots=True)
class _Method:
    """How NNCF quantizes a model, or a part of it."""

    recipe: ComponentRecipe
    target: Target
    #: Names of the operations that stay in float, or as compressed as they are.
    ignored: tuple[str, ...]
    statistics: Statistics

    def apply(self, model: ov.Model, crossing: Mapping[str, Value]) -> ov.Model:
        """Return ``model`` quantized; its inputs stand for values of the whole. It is consumed."""
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
        options = _options(recipe, self.target, recipe.smooth_quant_alpha if smooth else None)
        layers = float_layers(model, crossing)
        model = apply_nncf(model, self.statistics, crossing, ignored, options)
        correct_biases(model, layers, self.statistics)
        return model


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
            # Reducers work on arrays then, which they are given, not in the graph.
            inplace_statistics=False,
            disable_bias_correction=True,
            overflow_fix=getattr(nncf.OverflowFix, OVERFLOW[target.overflow_fix]),
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
    nodes = by_name(model)
    for layer in weight_layers(model, {*kept, *ignored}):
        put_encoded(nodes[layer.name], layer, SCHEME)
    model.validate_nodes_and_infer_types()
    if progress is not None:
        progress(1.0)
    return model
