"""Approximate rewrite: high-resolution self-attentions read every other key and value.

Neighbouring latents are alike, so a query finds about the same in a quarter of them. Every latent
still asks. Source: ToDo (Smith et al. 2024, arXiv:2402.13573), which thins keys and values to the
nearest neighbour of a coarser grid, with a larger factor at the larger levels.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import RequestError
from sdvino.graph.walk import is_constant

_MOVING = frozenset({"Reshape", "Transpose", "FakeQuantize", "Convert"})
_ROUNDING = frozenset({"FakeQuantize", "Convert"})


def thin_keys(model: ov.Model, factor: int, size: tuple[int, int]) -> int:
    """Thin the keys and values of the UNet's self-attentions, in place; approximate.

    The largest ones are thinned ``factor`` times along each side, those of the next level half as
    many times, and so on. ``size`` is the height and width of the latents. Works on float and 8-bit
    graphs of fixed shapes. Returns how many attentions were changed. Raises RequestError when there
    is none.
    """
    attentions = [
        (key, value)
        for node in model.get_ordered_ops()
        if node.get_type_name() == "ScaledDotProductAttention"
        for key, value in _self_attention(node)
    ]
    largest = max((_tokens(key) for key, _ in attentions), default=0)
    levels = _levels(size, factor, largest)
    done = 0
    for key, value in attentions:
        if _tokens(key) in levels:
            grid, step = levels[_tokens(key)]
            _thin(key, grid, step)
            _thin(value, grid, step)
            done += 1
    if not done:
        raise RequestError(
            "No self-attention that could be thinned is to be found in this UNet; leave the token"
            " downsampling out, or convert the model again."
        )
    model.validate_nodes_and_infer_types()
    return done


def _self_attention(node: ov.Node) -> list[tuple[ov.Node, ov.Node]]:
    """Return the products that give key and value, where they and the query see one source."""
    products = [_product(source) for source in node.input_values()[:3]]
    found = [product for product in products if product is not None]
    return [(found[1], found[2])] if len(found) == 3 and _same_source(*found) else []


def _tokens(product: ov.Node) -> int:
    return int(product.get_input_shape(0)[-2])


def _levels(
    size: tuple[int, int], factor: int, largest: int
) -> dict[int, tuple[tuple[int, int], int]]:
    """Return the tokens of each level -> its grid and how many times it is thinned."""
    levels: dict[int, tuple[tuple[int, int], int]] = {}
    rows, columns = size
    while factor > 1 and min(rows, columns) > 1:
        if rows * columns <= largest:
            levels[rows * columns] = (rows, columns), factor
            factor //= 2
        rows, columns = -(-rows // 2), -(-columns // 2)
    return levels


def _product(port: ov.Output) -> ov.Node | None:
    """Return the MatMul with constant weights that gives ``port``, apart from moving and bias."""
    node = port.get_node()
    while True:
        kind = node.get_type_name()
        if kind == "MatMul":
            return node if is_constant(node.input_value(1)) else None
        if kind in _MOVING:
            node = node.input_value(0).get_node()
        elif kind in ("Add", "Multiply"):
            data = [source for source in node.input_values() if not is_constant(source)]
            if len(data) != 1:
                return None
            node = data[0].get_node()
        else:
            return None


def _same_source(*products: ov.Node) -> bool:
    """Return whether the products are of the same states, each perhaps scaled and rounded."""
    return len({_unscaled(product.input_value(0)).get_node() for product in products}) == 1


def _unscaled(port: ov.Output) -> ov.Output:
    node = port.get_node()
    while node.get_type_name() in _ROUNDING or (
        node.get_type_name() == "Multiply" and is_constant(node.input_value(1))
    ):
        port = node.input_value(0)
        node = port.get_node()
    return port


def _thin(product: ov.Node, grid: tuple[int, int], step: int) -> None:
    """Give ``product`` every ``step``-th row and column of its states [B, rows * columns, C]."""
    source = product.input_value(0)
    node = source.get_node()
    rounds = node.get_type_name() == "FakeQuantize"
    states = node.input_value(0) if rounds else source
    batch, _, channels = states.get_shape()
    rows, columns = grid
    picture = ops.reshape(states, [batch, rows, columns, channels], False)
    thinned = ops.slice(picture, [0, 0], [rows, columns], [step, step], [1, 2])
    tokens = ops.reshape(thinned, [batch, -(-rows // step) * -(-columns // step), channels], False)
    if rounds:  # right before the product, where 8-bit kernels look for it
        ranges = node.input_values()[1:]
        tokens = ops.fake_quantize(tokens, *ranges, node.get_attributes()["levels"])
    product.input(0).replace_source_output(tokens.output(0))
