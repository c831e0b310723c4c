"""The compressed layers of an IR, and the same IR with some of them back in float.

Compression leaves the names of operations as they were, so a layer is found in both graphs. What
it adds are FakeQuantize before an input, a multiplication by SmoothQuant's scales before that, and
weights in 8 bits or fewer with the arithmetic that expands them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import openvino as ov

from sdvino.errors import SdvinoError
from sdvino.graph.walk import is_constant

#: Types that only compressed constants have.
_SMALL_TYPES = frozenset(
    {"u1", "u2", "u3", "u4", "u6", "u8", "i4", "i8", "nf4", "f8e4m3", "f8e5m2"}
)
#: Operations that move values without changing them: one scale for a tensor passes through.
_MOVING = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "StridedSlice"}
    | {"Slice", "Convert"}
)
_HELPERS = _MOVING | {"FakeQuantize", "Constant", "Result", "Subtract"}


def compressed_layers(model: ov.Model, original: Collection[str]) -> list[str]:
    """Return the operations of the compressed ``model`` that compute on compressed inputs.

    ``original`` are the names of the float model's operations. In graph order.
    """
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() not in _HELPERS
        and op.get_friendly_name() in original
        and _is_compressed(op, original)
    ]


def operation_names(model: ov.Model) -> frozenset[str]:
    """Return the names of all operations of ``model``."""
    return frozenset(op.get_friendly_name() for op in model.get_ops())


def restored(base: ov.Model, compressed: ov.Model, names: Iterable[str]) -> ov.Model:
    """Return a copy of ``compressed`` whose layers ``names`` compute as in the float ``base``.

    The names are of `compressed_layers`. The copy shares the float weights with ``base``; both
    models go on computing what they did. Raises SdvinoError when the graphs do not belong together.
    """
    original = operation_names(base)
    model = compressed.clone()
    layers = {op.get_friendly_name(): op for op in model.get_ops()}
    floats = {op.get_friendly_name(): op for op in base.get_ops()}
    for name in names:
        if name not in layers or name not in floats:
            raise SdvinoError(f"There is no layer {name!r} in both graphs.")
        layer, twin = layers[name], floats[name]
        for port in layer.inputs():
            value = port.get_source_output()
            if is_constant(value):
                if _is_small(value):
                    port.replace_source_output(twin.input_value(port.get_index()))
            elif _chain(value, original):
                _bypass(port, original)
        mine, its = _bias(layer), _bias(twin)
        if mine is not None and its is not None:  # bias correction has changed it
            mine.replace_source_output(its.get_source_output())
    model.validate_nodes_and_infer_types()
    return model


def _is_compressed(op: ov.Node, original: Collection[str]) -> bool:
    for value in op.input_values():
        if is_constant(value):
            if _is_small(value):
                return True
        elif any(node.get_type_name() == "FakeQuantize" for node in _chain(value, original)):
            return True
    return False


def _chain(value: ov.Output, original: Collection[str]) -> list[Any]:
    """Return what compression added before ``value``, the nearest first."""
    added: list[Any] = []
    node = value.get_node()
    while True:
        if _is_added(node, original):
            added.append(node)
        elif node.get_type_name() not in _MOVING:
            return added
        node = node.input_value(0).get_node()


def _bypass(port: Any, original: Collection[str]) -> None:
    """Connect ``port`` past what compression added before it."""
    while True:
        node = port.get_source_output().get_node()
        if _is_added(node, original):
            port.replace_source_output(node.input_value(0))
        elif node.get_type_name() in _MOVING:
            port = node.input(0)
        else:
            return


def _is_added(node: ov.Node, original: Collection[str]) -> bool:
    kind = node.get_type_name()
    if kind == "Multiply":  # SmoothQuant's scales
        return node.get_friendly_name() not in original and is_constant(node.input_value(1))
    return bool(kind == "FakeQuantize")


def _is_small(value: ov.Output) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Constant":
        return node.get_element_type().get_type_name() in _SMALL_TYPES
    return bool(node.get_type_name() == "FakeQuantize") or _is_small(node.input_value(0))


def _bias(op: ov.Node) -> Any:
    """Return the input port of the addition behind ``op`` that holds a constant, or None."""
    users = [port.get_node() for port in op.output(0).get_target_inputs()]
    if len(users) == 1 and users[0].get_type_name() == "Add":
        return next((p for p in users[0].inputs() if is_constant(p.get_source_output())), None)
    return None


def short_name(name: str) -> str:
    """Return the module's name as diffusers has it, from the name of an operation in it."""
    return re.sub(r"^(__module|self)\.", "", name).partition("/")[0]


def group_layers(names: Sequence[str], most: int) -> dict[str, tuple[str, ...]]:
    """Return ``names`` in at most ``most`` groups, by the modules that they are in.

    One layer a group where there is room, else blocks, as deep as possible.
    """
    if len(names) <= most:
        return {name: (name,) for name in names}
    paths = [short_name(name).split(".") for name in names]
    for depth in range(max(map(len, paths)), 0, -1):
        groups: dict[str, list[str]] = {}
        for name, path in zip(names, paths, strict=True):
            groups.setdefault(".".join(path[:depth]), []).append(name)
        if len(groups) <= most:
            return {key: tuple(members) for key, members in groups.items()}
    most = max(1, most)
    bounds = [i * len(names) // most for i in range(most + 1)]
    parts = [tuple(names[a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    return {f"{short_name(part[0])} ... {short_name(part[-1])}": part for part in parts}
