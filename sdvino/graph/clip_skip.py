"""Exact rewrite: the text encoder ends some layers early, as diffusers' ``clip_skip`` asks.

diffusers takes ``hidden_states[-(clip_skip + 1)]`` and runs the encoder's final layer norm on it.
An exported encoder usually gives only its last hidden state, but the whole residual stream is in
the graph: every layer adds its attention and then its MLP to it, and each of the two reads the
stream through a layer norm.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError, RequestError
from sdvino.graph.protocol import find_output

#: What a layer norm is exported as: MVN, then its weight and bias.
_AFFINE = frozenset({"Add", "Multiply"})
#: What quantization and precision conversion put between the operations.
_TRANSPARENT = frozenset({"FakeQuantize", "Convert"})


def select_hidden_state(model: ov.Model, clip_skip: int) -> None:
    """Make ``last_hidden_state`` the final layer norm of an earlier layer, in place; exact.

    ``clip_skip`` layers are left out: 0 changes nothing. The pooled output still comes from the
    whole encoder, as in transformers.
    Raises RequestError when the encoder has fewer layers, ModelFolderError when the graph is not
    that of a CLIP text encoder.
    """
    if clip_skip < 0:
        raise RequestError(f"clip_skip is {clip_skip}; give a whole number from 0 up.")
    if clip_skip == 0:
        return
    last = find_output(model, "last_hidden_state")
    norm, affine = _final_norm(last.get_node().input_value(0))
    states = _layer_outputs(norm.input_value(0))
    if clip_skip >= len(states):
        raise RequestError(
            f"clip_skip is {clip_skip}, but this text encoder has {len(states) - 1} layers;"
            f" give {len(states) - 1} or less."
        )
    _rebuild_norm(last.get_node(), norm, affine, states[clip_skip])
    model.validate_nodes_and_infer_types()


def _final_norm(state: ov.Output) -> tuple[ov.Node, list[ov.Node]]:
    """Return the MVN that ``state`` comes from and the nodes after it, in order."""
    after: list[ov.Node] = []
    node = state.get_node()
    while node.get_type_name() in _AFFINE and len(after) < 4:
        after.append(node)
        node = _operand(node, constant=False).get_node()
    if node.get_type_name() != "MVN":
        raise _not_clip()
    return node, after[::-1]


def _operand(node: ov.Node, *, constant: bool) -> ov.Output:
    """Return the weight (or else the data) that the affine ``node`` of a layer norm takes."""
    for port in node.inputs():
        source = port.get_source_output()
        if _is_constant(source.get_node()) == constant:
            return source
    raise _not_clip()


def _is_constant(node: ov.Node) -> bool:
    """Return whether ``node`` is a weight, stored as it is, as f16, or compressed."""
    if node.get_type_name() == "Constant":
        return True
    inputs = node.inputs()
    return (
        bool(inputs)
        and all(_is_constant(i.get_source_output().get_node()) for i in inputs)
        and (node.get_type_name() in _AFFINE | _TRANSPARENT | {"Subtract", "Reshape"})
    )


def _layer_outputs(state: ov.Output) -> list[ov.Output]:
    """Return the residual stream after the last layer, the one before, ... and the embeddings."""
    states = [state]
    while True:
        middle = _before(states[-1])
        earlier = None if middle is None else _before(middle)
        if earlier is None:
            return states
        states.append(earlier)


def _before(state: ov.Output) -> ov.Output | None:
    """Return the residual stream before the addition that gave ``state``; None at its start."""
    node = _through(state).get_node()
    if node.get_type_name() != "Add":
        return None
    streams = [
        source
        for source in (_through(port.get_source_output()) for port in node.inputs())
        if _feeds_norm(source)
    ]
    return streams[0] if len(streams) == 1 else None


def _through(port: ov.Output) -> ov.Output:
    while port.get_node().get_type_name() in _TRANSPARENT:
        port = port.get_node().input_value(0)
    return port


def _feeds_norm(port: ov.Output) -> bool:
    """Return whether a layer norm reads ``port``: the mark of the residual stream."""
    for target in port.get_target_inputs():
        node = target.get_node()
        if node.get_type_name() == "MVN":
            return True
        if node.get_type_name() in _TRANSPARENT and _feeds_norm(node.output(0)):
            return True
    return False


def _rebuild_norm(result: ov.Node, norm: ov.Node, affine: list[ov.Node], state: ov.Output) -> None:
    """Copy the final layer norm onto ``state`` and give it out as the last hidden state."""
    old = result.input_value(0)
    names = old.get_names()
    given = norm.get_attributes()
    new = ops.mvn(
        state,
        norm.input_value(1),
        given["normalize_variance"],
        given["eps"],
        given["eps_mode"],
    )
    for node in affine:
        constant = _operand(node, constant=True)
        new = (ops.add if node.get_type_name() == "Add" else ops.multiply)(new, constant)
    old.set_names(set())
    new.output(0).set_names(names)
    result.input(0).replace_source_output(new.output(0))


def _not_clip() -> ModelFolderError:
    return ModelFolderError(
        "clip_skip needs a text encoder that ends in a layer norm, and this one does not;"
        " leave clip_skip out."
    )
