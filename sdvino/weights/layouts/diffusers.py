"""diffusers folders: the tensors of a component, those that older versions saved too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sdvino.errors import RequestError
from sdvino.inputs.files import read_json
from sdvino.weights.layouts import autoencoder
from sdvino.weights.layouts.original import clip_tensors
from sdvino.weights.layouts.rename import LayoutError
from sdvino.weights.safetensors import PICKLES, Tensor, TensorFile, open_tensors


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


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors of one variant in ``folder``: the plain one, or else fp16's.

    Their headers are checked. Raises RequestError for parts that are missing.
    """
    usable = [file for file in sorted(folder.glob("*.safetensors")) if "non_ema" not in file.name]
    plain = [file for file in usable if ".fp16" not in file.name]
    chosen = plain if plain else usable
    if chosen:
        for file in chosen:
            TensorFile.open(file)
        _check_shards(folder, chosen)
        return tuple(chosen)
    if any(file.suffix.lower() in PICKLES for file in folder.glob("*")):
        raise RequestError(
            f"{folder} holds its weights as a pickle, which can run code when it is opened;"
            " get the .safetensors version of the model."
        )
    raise RequestError(f"{folder} holds no .safetensors weights; download the source model again.")


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Check that every part that the index of the chosen variant lists is there."""
    half = ".fp16" in files[0].name
    names = {file.name for file in files}
    for index in folder.glob("*.safetensors.index*.json"):
        if (".fp16" in index.name) != half:
            continue
        table = read_json(index, f"{folder.name}/{index.name}").get("weight_map")
        listed = set(map(str, table.values())) if isinstance(table, dict) else set()
        missing = sorted(listed - names)
        if missing:
            raise RequestError(
                f"{folder} has no {missing[0][:80]}, which {index.name} lists;"
                " download the source model again, complete."
            )
