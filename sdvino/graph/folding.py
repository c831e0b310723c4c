"""What a graph would unfold into while it is compiled: constants that only its text makes large."""

from __future__ import annotations

import math

import openvino as ov

from sdvino.errors import ModelFolderError

#: Elements that operations on constants alone may add to what is in the file: 256 MB of floats.
#: Stable Diffusion's graphs add a few thousand (masks, positions, frequencies).
MOST_ADDED = 2**26


def check_folding(model: ov.Model, name: str) -> None:
    """Raise ModelFolderError when ``model`` would fill the memory before it has been given a thing.

    OpenVINO computes what depends on constants alone once, and keeps it: a Broadcast or Tile of one
    number, a few bytes of XML, can become any number of gigabytes. ``name`` is the component's.
    """
    known: set[str] = set()
    added = 0
    for node in model.get_ordered_ops():
        count = node.get_input_size()
        kind = node.get_type_name()
        if kind == "Constant" or (kind == "ShapeOf" and node.get_input_partial_shape(0).is_static):
            known.add(node.get_name())
        elif count and all(
            node.input_value(i).get_node().get_name() in known for i in range(count)
        ):
            known.add(node.get_name())
            sources = node.input_values()
            given = max(_elements(source) for source in sources)
            added += sum(max(0, _elements(output) - given) for output in node.outputs())
            if added > MOST_ADDED:
                raise ModelFolderError(
                    f"The graph of the {name} makes constants of over {MOST_ADDED:,} numbers out of"
                    " small ones, which no model does; get the model again."
                )


def _elements(output: ov.Output) -> int:
    shape = output.get_partial_shape()
    return math.prod(shape.to_shape()) if shape.is_static else 0
