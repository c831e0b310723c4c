"""Whatever people have, opened: a folder, a single file or a hub id becomes a checked source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from sdvino.convert.hub_source import Outline, download, is_hub_source, look_up
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.single_file import SingleFile
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.folder.hub import Hub
from sdvino.inputs.files import user_path
from sdvino.settings import check_choice
from sdvino.text.clip_vocabulary import find_vocabulary
from sdvino.weights.safetensors import TensorFile

Source: TypeAlias = DiffusersFolder | OpenVinoFolder
_Found = TypeVar("_Found")

#: What a single file's UNet may be said to predict.
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction")
#: Sub-folder of the work folder for what a single file lacks: configs and tokenizers.
OUTLINE = "outline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is said of a source beside where it is. Raises RequestError for what cannot be."""

    #: The model's name; None: the path says it, or the hub id.
    name: str | None = None
    #: Of single files: a folder with CLIP's vocabulary.
    tokenizer: Path | None = None
    #: Of single files that do not say: epsilon or v_prediction.
    prediction_type: str | None = None
    #: A single file must hold its autoencoder; False where another takes its place.
    own_vae: bool = True

    def __post_init__(self) -> None:
        check_choice("prediction type", self.prediction_type, PREDICTION_TYPES)


def open_source(
    source: Path | str, work: Path, told: Told | None = None, *, revision: str | None = None
) -> Source:
    """Return the checked source that ``source`` names.

    source: a diffusers folder, an OpenVINO folder, a .safetensors checkpoint, or, as a str, a model
    on the hub (owner/name, owner/name/FILE.safetensors), which is downloaded; what exists on the
    disk goes before it. work: a folder for what a single file lacks, configs and tokenizers; it
    must stay until the conversion is done, and what an earlier conversion of the same file left
    there is used again.

    Raises RequestError, in one sentence, for what cannot be converted.
    """
    told = Told() if told is None else told
    path = resolve_source(source, Hub(revision=revision))
    return _open(path, source, work, told if is_here(source) else _named(told, source))


def outline_source(
    source: Path | str, work: Path, told: Told | None = None, hub: Hub | None = None
) -> tuple[Source, int]:
    """Return the source that `open_source` would, and the bytes that it would download first.

    No weight is downloaded or read: the source tells what a conversion would take, and can be no
    more.
    """
    told, hub = Told() if told is None else told, Hub() if hub is None else hub
    if is_here(source):
        return open_source(source, work, told, revision=hub.revision), 0
    told = _named(told, source)
    found = _on_hub(source, look_up, hub)
    if isinstance(found, Path):
        return _open(found, source, work, told), 0
    if found.header is not None:
        where = found.folder / next(iter(found.weights))
        header = TensorFile.of_header(where, found.header, 0, None)
        file = SingleFile.of(header, prediction_type=told.prediction_type, own_vae=told.own_vae)
        return _of_file(file, work, told), found.download
    _check_options(source, told)
    return _outlined_hub(found, str(told.name)), found.download


def resolve_source(source: Path | str, hub: Hub) -> Path:
    """Return the folder or file that ``source`` names, downloaded when need be; see `open_source`.

    Raises RequestError when there is none, SdvinoError when the hub cannot be reached.
    """
    if not is_here(source):
        return _on_hub(source, download, hub)
    if hub.revision is not None:
        raise RequestError(
            f"--revision is for models on the hub, and {user_path(source)} is here; leave the"
            " option out."
        )
    return user_path(source)


def is_here(source: Path | str) -> bool:
    """Tell whether ``source`` is a folder or a file, rather than on the hub or nowhere."""
    try:
        return user_path(source).exists()
    except OSError:  # a name too long for a file
        return False


def _named(told: Told, source: Path | str) -> Told:
    return replace(told, name=str(source)) if told.name is None else told


def _on_hub(source: Path | str, get: Callable[[str, Hub], _Found], hub: Hub) -> _Found:
    """Return what ``get`` finds on the hub; raises RequestError for what is no hub id."""
    text = str(source)
    if isinstance(source, Path) or not is_hub_source(text):
        raise RequestError(
            f"{text[:200]} does not exist, and it is no hub id (owner/name) either; give a"
            " diffusers or OpenVINO folder, a .safetensors checkpoint, or a hub id."
        )
    return get(text, hub)


def _open(path: Path, source: Path | str, work: Path, told: Told) -> Source:
    """Return the source in ``path``, which ``source`` names."""
    if path.is_file():
        file = SingleFile.open(path, prediction_type=told.prediction_type, own_vae=told.own_vae)
        return _of_file(file, work, told)
    _check_options(source, told)
    if (path / "unet" / "openvino_model.xml").is_file():
        return OpenVinoFolder.open(path, name=told.name)
    return DiffusersFolder.open(path, name=told.name)


def _outlined_hub(found: Outline, name: str) -> Source:
    parts = sorted({file.partition("/")[0] for file in found.weights})
    sizes = {part: found.bytes_of(part) for part in parts}
    if (found.folder / "unet" / "openvino_model.xml").is_file():
        return OpenVinoFolder.outline(found.folder, name=name, elsewhere=sizes)
    return DiffusersFolder.open(found.folder, name=name, elsewhere=sizes)


def _check_options(source: Path | str, told: Told) -> None:
    for value, option in (
        (told.tokenizer, "--tokenizer"),
        (told.prediction_type, "--prediction-type"),
    ):
        if value is not None:
            raise RequestError(
                f"{option} is for single files, and {source} is a folder, which says that itself;"
                " leave the option out."
            )


def _of_file(file: SingleFile, work: Path, told: Told) -> DiffusersFolder:
    """Return the checkpoint ``file`` as a diffusers folder whose weights are still in it."""
    vocabulary = find_vocabulary(told.tokenizer, tokens=file.tokens)
    return DiffusersFolder.open(
        file.outline(work / OUTLINE, vocabulary),
        name=file.name if told.name is None else told.name.removesuffix(".safetensors"),
        packed=file.components,
    )
