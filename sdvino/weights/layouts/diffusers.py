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


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of one variant in ``folder``: the plain one, or else fp16's."""
    files = sorted(folder.glob("*.safetensors"))
    usable = [file for file in files if "non_ema" not in file.name]
    plain = [file for file in usable if ".fp16" not in file.name]
    chosen = plain if plain else usable
    if not chosen:
        raise RequestError(f"{folder} holds no .safetensors weights; give the folder complete.")
    return chosen
