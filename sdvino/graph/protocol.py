"""What the text and image parts ask of a compiled component, and how tensors are found by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import openvino as ov
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError


class InferenceComponent(Protocol):
    """A compiled graph. `sdvino.runtime.component.Component` is one; tests bring their own."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Run the graph once: arrays by tensor name in, arrays by tensor name out.

        The arrays returned may be views of buffers that the next call writes again.
        """
        ...


def find_input(model: ov.Model, name: str) -> ov.Output:
    """Return the input of ``model`` one of whose tensor names is ``name``.

    An input's ``any_name`` may be a number in a compiled or re-saved model, so every name counts.
    Raises ModelFolderError when there is no such input.
    """
    return _find(model.inputs, "input", name)


def find_output(model: ov.Model, name: str) -> ov.Output:
    """Return the output of ``model`` one of whose tensor names is ``name``; see `find_input`."""
    return _find(model.outputs, "output", name)


def has_output(model: ov.Model, name: str) -> bool:
    """Return whether an output of ``model`` carries the tensor name ``name``."""
    return any(name in port.get_names() for port in model.outputs)


def _find(ports: list[ov.Output], kind: str, name: str) -> ov.Output:
    for port in ports:
        if name in port.get_names():
            return port
    known = ", ".join("/".join(sorted(port.get_names())) or "(no name)" for port in ports)
    raise ModelFolderError(
        f"The model has no {kind} {name!r}, only: {known};"
        " export it again with optimum-intel or `sdvino convert`."
    )
