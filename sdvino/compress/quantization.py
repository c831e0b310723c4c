"""Weights and activations in 8 bits (W8A8): NNCF's post-training quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.fragile import fragile_nodes
from sdvino.compress.quiet import quiet

Sample = Mapping[str, NDArray[Any]]

#: How much of the activations' range SmoothQuant moves into the weights of linears
#: (arXiv:2211.10438); 0.8 to 1.0 is what is published to work for diffusion UNets.
SMOOTH_QUANT_ALPHA = 0.95

_WITH_WEIGHTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")


def quantize(
    component: str,
    model: ov.Model,
    samples: Sequence[Sample],
    *,
    progress: Callable[[float], None] | None = None,
) -> ov.Model:
    """Return ``model`` with weights and activations in 8 bits, but for its fragile layers.

    ``samples`` are calibration inputs by tensor name; all are used, in order, so the result is
    the same each time. Weights get one scale for each output channel, activations one for each
    tensor (symmetric weights, asymmetric activations). ``progress`` is called with the share of
    the calibration passes done, 0 to 1. ``model`` is consumed.
    Source: NNCF, "Post-training Quantization".
    """
    with quiet():
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

        smooth = any(op.get_type_name() == "MatMul" for op in model.get_ops())
        passes = 2 if smooth else 1
        seen = 0

        def feed(sample: Sample) -> dict[str, NDArray[Any]]:
            nonlocal seen
            seen += 1
            if progress is not None:
                progress(min(1.0, seen / (passes * len(samples))))
            return dict(sample)

        fragile = fragile_nodes(component, nodes_with_weights(model))
        ignored = list(dict.fromkeys([*fragile, *residual_sources(model)]))
        return nncf.quantize(
            model,
            nncf.Dataset(list(samples), feed),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(samples),
            # SmoothQuant, and attention's own rules, belong to this type.
            model_type=nncf.ModelType.TRANSFORMER if smooth else None,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(
                    matmul=SMOOTH_QUANT_ALPHA, convolution=-1
                )
            ),
        )


def nodes_with_weights(model: ov.Model) -> list[str]:
    """Return the names of the operations that multiply by constant weights, in graph order."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() in _WITH_WEIGHTS and _is_constant(op.input_value(1))
    ]


def residual_sources(model: ov.Model) -> list[str]:
    """Return the convolutions whose output is itself the residual of a block's sum.

    They are the first one and the up- and downsamplers before a block without conv_shortcut. When
    both they and the block's last convolution are quantized, OpenVINO's CPU plugin (seen in
    2026.4) adds the residual inside that last convolution wrongly if shapes are dynamic, and the
    picture is garbage. In float they cost little: they are few, and at low resolution.
    """
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Convolution" and _is_residual(_with_bias(op))
    ]


def _with_bias(convolution: ov.Node) -> ov.Node:
    """Return the addition of the convolution's bias, or the convolution if it has none."""
    users = [port.get_node() for port in convolution.output(0).get_target_inputs()]
    if len(users) == 1 and users[0].get_type_name() == "Add":
        values = [port.get_source_output() for port in users[0].inputs()]
        if any(_is_constant(value) for value in values):
            return users[0]
    return convolution


def _is_residual(node: ov.Node) -> bool:
    users = [port.get_node().get_type_name() for port in node.output(0).get_target_inputs()]
    return len(users) > 1 and "Add" in users


def _is_constant(value: ov.Output) -> bool:
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose", "Multiply", "Subtract"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
