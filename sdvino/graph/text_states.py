"""Exact rewrite: a text encoder gives the states that the pipeline reads, and nothing else.

Stable Diffusion 1.x and 2.x read the last layer through the encoder's final layer norm, or with
``clip_skip`` an earlier layer through that norm; Stable Diffusion XL reads the layer before the
last as it is. An exported encoder may give every layer (``hidden_states.0`` ...) or only its last
state, but the whole residual stream is in the graph: every layer adds its attention and then its
MLP to it, and each of the two reads the stream through a layer norm. Layers that no state needs
drop out of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError, RequestError
from sdvino.graph.protocol import find_output
from sdvino.graph.walk import is_constant

#: The pooled state, projected (transformers' CLIPTextModelWithProjection).
POOLED = "text_embeds"
#: What a layer norm is exported as: MVN, then its weight and bias.
_AFFINE = frozenset({"Add", "Multiply"})
#: What quantization and precision conversion put between the operations.
_TRANSPARENT = frozenset({"FakeQuantize", "Convert"})
_LAYER = re.compile(r"hidden_states\.(\d{1,3})")


def state_name(skipped: int) -> str:
    """Return the tensor name of the state without the last ``skipped`` layers."""
    return f"state_without_{skipped}"


def give_states(
    model: ov.Model, skipped: Iterable[int], *, final_norm: bool, pooled: bool = False
) -> None:
    """Make the outputs of ``model`` the states named by `state_name`, in place; exact.

    Each number in ``skipped`` is of layers left out at the encoder's end. With ``final_norm`` a
    state goes through the encoder's last layer norm. With ``pooled``, `POOLED` stays an output
    too: it comes from the whole encoder, as in transformers.
    Raises RequestError when the encoder has fewer layers, ModelFolderError when the graph is not
    that of a CLIP text encoder.
    """
    wanted: dict[str, ov.Output] = {}
    if pooled:
        wanted[POOLED] = find_output(model, POOLED).get_node().input_value(0)
    for number in sorted(set(skipped)):
        if number < 0:
            raise RequestError("clip_skip is negative; give a whole number from 0 up.")
        find = _normed_state if final_norm else _plain_state
        wanted[state_name(number)] = find(model, number)
    for result in model.get_results():
        model.remove_result(result)
    for name, port in wanted.items():
        port.add_names({name})
        model.add_results([ops.result(port)])
    model.validate_nodes_and_infer_types()


def _normed_state(model: ov.Model, skipped: int) -> ov.Output:
    last = find_output(model, "last_hidden_state").get_node().input_value(0)
    if skipped == 0:
        return last
    norm, affine = _final_norm(last)
    states = _layer_outputs(norm.input_value(0))
    _check_layers(skipped, len(states) - 1)
    return _norm_again(norm, affine, states[skipped])


def _plain_state(model: ov.Model, skipped: int) -> ov.Output:
    given = {
        int(found.group(1)): port.get_node().input_value(0)
        for port in model.outputs
        for name in port.get_names()
        if (found := _LAYER.fullmatch(name)) is not None
    }
    # Number 0 is the embeddings and the highest the last layer, which some versions give normed.
    layers = max(given, default=0)
    if skipped > 0 and layers - skipped in given:
        return given[layers - skipped]
    last = find_output(model, "last_hidden_state").get_node().input_value(0)
    norm, _ = _final_norm(last)
    states = _layer_outputs(norm.input_value(0))
    _check_layers(skipped, len(states) - 1)
    return states[skipped]


def _check_layers(skipped: int, layers: int) -> None:
    if skipped > layers:
        raise RequestError(
            f"This clip_skip leaves out {skipped} layers, but this text encoder has {layers}"
            " layers; give a smaller one."
        )


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
        if is_constant(source) == constant:
            return source
    raise _not_clip()


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


def _norm_again(norm: ov.Node, affine: list[ov.Node], state: ov.Output) -> ov.Output:
    """Return ``state`` through a copy of the final layer norm."""
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
    return new.output(0)


def _not_clip() -> ModelFolderError:
    return ModelFolderError(
        "The text encoder does not end in a layer norm, so its earlier layers are not to be found;"
        " leave clip_skip out, or export it again with optimum-intel or `sdvino convert`."
    )
