"""diffusers folders: the tensors of a component, those that older versions saved too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdvino.errors import RequestError
from sdvino.weights.layouts import autoencoder
from sdvino.weights.layouts.original import clip_tensors
from sdvino.weights.layouts.rename import LayoutError
from sdvino.weights.safetensors import Tensor, open_tensors


def component_tensors(component: str, files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of ``component`` in ``files``, in the naming of today.

    component: a sub-folder of a diffusers folder. Headers alone are read; raises RequestError.
    """
    files = list(files)
    tensors = open_tensors(files)
    try:
        if component == "vae":
            return autoencoder.current(tensors)
        if component.startswith("text_encoder"):
            return clip_tensors(tensors)
    except LayoutError as error:
        raise RequestError(
            f"{files[0]} holds a tensor twice, under an old name and today's ({error});"
            " download the model again."
        ) from error
    return tensors
