"""Exact rewrite: what a UNet makes of the text alone becomes a small model of its own.

The keys and values of every cross-attention are linear in the text states and the same at every
step. Computed once for a prompt and fed as inputs, they cost nothing in the loop, and the UNet no
longer holds their weights (341 million parameters in Stable Diffusion XL).
"""

from __future__ import annotations

import openvino as ov

from sdvino.errors import ModelFolderError
from sdvino.graph.protocol import find_input
from sdvino.graph.walk import depending_on, keep_outputs, new_input

#: The UNet's text input.
TEXT = "encoder_hidden_states"
_PREFIX = "text_key."
#: Operations that only move numbers, or round them: they stay in the UNet, where the plugin fuses
#: them into the attention.
_MOVING = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "FakeQuantize", "Convert"})


def take_text_keys(model: ov.Model) -> None:
    """Make of the UNet ``model``, in place, one that takes its text keys and values; exact.

    The input `TEXT` gives way to those that `give_text_keys` gives, float32, in their names: for a
    cross-attention two of [B, 77, C]. Shapes must be fixed and frozen (see sdvino.graph.walk).
    """
    text = find_input(model, TEXT).get_node()
    inputs = []
    for number, port in enumerate(_frontier(model)):
        targets = port.get_target_inputs()
        parameter = new_input(port, f"{_PREFIX}{number}")
        for target in targets:
            target.replace_source_output(parameter.output(0))
        inputs.append(parameter)
    model.add_parameters(inputs)
    model.remove_parameter(text)
    model.validate_nodes_and_infer_types()


def give_text_keys(model: ov.Model) -> None:
    """Make of the UNet ``model``, in place, the model from `TEXT` to its keys and values; exact."""
    ports = _frontier(model)
    keep_outputs(model, {f"{_PREFIX}{number}": port for number, port in enumerate(ports)})


def is_text_key(name: str) -> bool:
    """Return whether ``name`` is that of a tensor between the two models."""
    return name.startswith(_PREFIX)


def _frontier(model: ov.Model) -> list[ov.Output]:
    """Return the last tensors that depend on the text alone, in the graph's order."""
    text = find_input(model, TEXT).get_node()
    rest = depending_on(model, [p for p in model.get_parameters() if p != text])
    alone = depending_on(model, [text]) - rest
    found: dict[tuple[ov.Node, int], ov.Output] = {}
    for node in model.get_ordered_ops():
        if node not in rest:
            continue
        for source in node.input_values():
            if source.get_node() in alone:
                port = _computed(source)
                found[port.get_node(), port.get_index()] = port
    if not found:
        raise ModelFolderError(
            "The UNet does not use its text input; convert or get the model again."
        )
    return list(found.values())


def _computed(port: ov.Output) -> ov.Output:
    """Return where the numbers of ``port`` were computed, before they were moved."""
    node = port.get_node()
    while node.get_type_name() in _MOVING:
        port = node.input_value(0)
        node = port.get_node()
    return port
