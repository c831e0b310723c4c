"""Approximate rewrite: attention of a model with 8-bit activations computes in bf16.

Attention's own products stay in float where everything around them is in 8 bits, and are half of
what a UNet then takes. A processor with bf16 instructions multiplies them faster (measured: 1.6
times, docs/profile.md); what bf16 rounds off is a small part of what 8 bits did before. Softmax's
sums stay in f32, and so does what lies between the attentions.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

#: Query, key and value; a mask and a scale may follow.
_STATES = 3


def attention_to_bf16(model: ov.Model) -> int:
    """Let every f32 attention of ``model`` compute in bf16, in place; approximate.

    A model without 8-bit activations stays as it is: it is asked to be exact. Returns how many
    attentions were rewritten.
    """
    nodes = model.get_ordered_ops()
    if not any(node.get_type_name() == "FakeQuantize" for node in nodes):
        return 0
    done = 0
    for node in nodes:
        if node.get_type_name() == "ScaledDotProductAttention" and _in_f32(node):
            _narrow(node)
            done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _in_f32(node: ov.Node) -> bool:
    return all(source.get_element_type() == ov.Type.f32 for source in node.input_values())


def _narrow(node: ov.Node) -> None:
    """Put converters before and behind ``node``."""
    # What the device fuses is one tensor type throughout, mask and scale included.
    for port in node.inputs():
        port.replace_source_output(ops.convert(port.get_source_output(), "bf16").output(0))
    node.validate_and_infer_types()
    readers = node.output(0).get_target_inputs()
    wide = ops.convert(node, "f32")
    wide.set_friendly_name(f"{node.get_friendly_name()}/f32")
    for reader in readers:
        reader.replace_source_output(wide.output(0))
