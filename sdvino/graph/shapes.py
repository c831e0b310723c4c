"""Exact rewrite: fixed input shapes, with which OpenVINO plans memory and picks faster kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import openvino as ov

from sdvino.errors import ModelFolderError
from sdvino.graph.protocol import find_input


def reshape_static(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the inputs of ``model`` named in ``shapes`` fixed shapes, in place; exact.

    For a UNet: ``sample`` [B, C, h, w], ``encoder_hidden_states`` [B, 77, D], ``timestep`` [1] or
    []; a shape that differs from the input's own rank only by a leading 1 is fitted to it.
    Raises ModelFolderError for an input that is not there or a shape that the graph does not take.
    """
    wanted: dict[ov.Output, ov.PartialShape] = {}
    for name, shape in shapes.items():
        port = find_input(model, name)
        wanted[port] = ov.PartialShape(_fit(port.get_partial_shape(), list(shape)))
    try:
        model.reshape(wanted)
    except RuntimeError as error:
        text = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ModelFolderError(
            f"The model does not take inputs of the shapes {text};"
            " its files do not fit what its configuration says."
        ) from error


def _fit(declared: ov.PartialShape, shape: list[int]) -> list[int]:
    """Add or drop a leading 1 where the graph declares a scalar as [1], or [1] as a scalar."""
    if declared.rank.is_dynamic:
        return shape
    rank = declared.rank.get_length()
    if rank == 1 and not shape:
        return [1]
    if rank == 0 and shape == [1]:
        return []
    return shape
