"""Which operations of a component's graph compression works on."""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov

from sdvino.graph.walk import is_constant

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData")
#: What multiplies: by weights, or one activation by another.
PRODUCTS = (*CONVOLUTIONS, "MatMul", "ScaledDotProductAttention")
_FLOATS = ("f32", "f16", "bf16")


def nodes_with_weights(model: ov.Model) -> list[str]:
    """Return the names of the operations that multiply by constant weights, in graph order."""
    return _names(model, (*CONVOLUTIONS, "MatMul"))


def linears(model: ov.Model) -> list[str]:
    """Return the names of the products with constant weights and of the embeddings."""
    return [*_names(model, ("MatMul",)), *embeddings(model)]


def embeddings(model: ov.Model) -> list[str]:
    """Return the names of the operations that look rows up in a constant table."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Gather"
        and op.get_element_type().get_type_name() in _FLOATS
        and len(op.input_value(0).get_partial_shape()) == 2
        and is_constant(op.input_value(0))
    ]


def operations(model: ov.Model) -> list[str]:
    """Return the names of all operations but constants, inputs and outputs."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() not in ("Constant", "Parameter", "Result")
    ]


def attention_nodes(model: ov.Model) -> list[str]:
    """Return the names of the products of two activations: those of attention."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "ScaledDotProductAttention"
        or (
            op.get_type_name() == "MatMul"
            and not any(is_constant(op.input_value(port)) for port in (0, 1))
        )
    ]


def residual_sources(model: ov.Model) -> list[str]:
    """Return the convolutions whose output is itself the residual of a block's sum.

    They are the first one and the up- and downsamplers before a block without conv_shortcut. When
    both they and the block's last convolution are quantized, OpenVINO's CPU plugin (seen in 2026.4
    with AVX-512) adds the residual inside that last convolution wrongly if shapes are dynamic, and
    the picture is garbage. sdvino runs static shapes; OpenVINO GenAI and optimum-intel do not. In
    float they cost little: they are few, and at low resolution (0.3 % of the multiply-adds of
    Stable Diffusion 1.5's UNet, 3 % of its VAE decoder's).
    """
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Convolution" and _is_residual(_with_bias(op))
    ]


def _names(model: ov.Model, kinds: Sequence[str]) -> list[str]:
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() in kinds and is_constant(op.input_value(1))
    ]


def _with_bias(convolution: ov.Node) -> ov.Node:
    """Return the addition of the convolution's bias, or the convolution if it has none."""
    users = _users(convolution)
    if len(users) == 1 and users[0].get_type_name() == "Add":
        values = [port.get_source_output() for port in users[0].inputs()]
        if any(is_constant(value) for value in values):
            return users[0]
    return convolution


def _is_residual(node: ov.Node) -> bool:
    users = [user.get_type_name() for user in _users(node)]
    return len(users) > 1 and "Add" in users


def _users(node: ov.Node) -> list[ov.Node]:
    """Return what reads the output of ``node``, directly or quantized."""
    users: list[ov.Node] = []
    for port in node.output(0).get_target_inputs():
        user = port.get_node()
        users += _users(user) if user.get_type_name() == "FakeQuantize" else [user]
    return users
