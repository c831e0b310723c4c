"""Whatever people have, opened: a folder, a single file or a hub id becomes a checked source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sdvino.convert.hub_source import Outline, download, is_hub_source, look_up
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.single_file import SingleFile
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.folder.hub import Report, report_to_stderr
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


def open_source(
    source: Path | str,
    work: Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_download: int | None = None,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    name: str | None = None,
    own_vae: bool = True,
    report: Report = report_to_stderr,
) -> Source:
    """Return the checked source that ``source`` names.

    source: a diffusers folder, an OpenVINO folder, a .safetensors checkpoint, or, as a str, a model
    on the hub (owner/name, owner/name/FILE.safetensors); what exists on the disk goes before it.
    work: a folder for what a single file lacks, configs and tokenizers; it must stay until the
    conversion is done, and what an earlier conversion of the same file left there is used again.
    revision, offline: of the hub. max_download: the most bytes that may come from there; None: 32
    GB. tokenizer: a folder with CLIP's vocabulary, for single files.
    prediction_type: epsilon or v_prediction, for single files that do not say. name: the model's,
    where ``source`` is what `resolve_source` returned for a hub id.
    own_vae: a single file must hold its autoencoder; False where another takes its place.
    report: told, in a line, what is about to be downloaded.

    Raises RequestError, in one sentence, for what cannot be converted.
    """
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    path = resolve_source(
        source, revision=revision, offline=offline, max_download=max_download, report=report
    )
    if name is None and not _exists(user_path(source)):
        name = str(source)
    if path.is_file():
        file = SingleFile.open(path, prediction_type=prediction_type, own_vae=own_vae)
        return _of_file(file, name, work, tokenizer)
    _check_options(source, tokenizer, prediction_type)
    return _open_folder(path, name)


def outline_source(
    source: Path | str,
    work: Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_download: int | None = None,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    name: str | None = None,
    own_vae: bool = True,
    report: Report = report_to_stderr,
) -> tuple[Source, int]:
    """Return the source that `open_source` would, and the bytes that it would download first.

    No weight is downloaded or read: the source tells what a conversion would take, and
    can be no more. The rest is as in `open_source`.
    """
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    found: Path | Outline = user_path(source)
    if not is_here(source):
        name = str(source) if name is None else name
        found = _on_hub(
            source,
            look_up,
            revision=revision,
            offline=offline,
            max_download=max_download,
            report=report,
        )
    elif revision is not None:
        raise _revision_of_folder(found)
    if isinstance(found, Outline):
        if found.header is not None:
            where = found.folder / next(iter(found.weights))
            header = TensorFile.of_header(where, found.header, 0, None)
            file = SingleFile.of(header, prediction_type=prediction_type, own_vae=own_vae)
            return _of_file(file, name, work, tokenizer), found.download
        _check_options(source, tokenizer, prediction_type)
        return _outlined_hub(source, found, name), found.download
    if found.is_file():
        file = SingleFile.open(found, prediction_type=prediction_type, own_vae=own_vae)
        return _of_file(file, name, work, tokenizer), 0
    _check_options(source, tokenizer, prediction_type)
    return _open_folder(found, name), 0


def _outlined_hub(source: Path | str, found: Outline, name: str | None) -> Source:
    parts = sorted({file.partition("/")[0] for file in found.weights})
    sizes = {part: found.bytes_of(part) for part in parts}
    if (found.folder / "unet" / "openvino_model.xml").is_file():
        return OpenVinoFolder.outline(
            found.folder, name=str(source) if name is None else name, elsewhere=sizes
        )
    return DiffusersFolder.open(found.folder, name=name, elsewhere=sizes)


def _open_folder(path: Path, name: str | None) -> Source:
    if (path / "unet" / "openvino_model.xml").is_file():
        return OpenVinoFolder.open(path, name=name)
    return DiffusersFolder.open(path, name=name)


def _check_options(source: Path | str, tokenizer: Path | None, prediction_type: str | None) -> None:
    for value, option in ((tokenizer, "--tokenizer"), (prediction_type, "--prediction-type")):
        if value is not None:
            raise RequestError(
                f"{option} is for single files, and {source} is a folder, which says that itself;"
                " leave the option out."
            )


def resolve_source(
    source: Path | str,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_download: int | None = None,
    report: Report = report_to_stderr,
) -> Path:
    """Return the folder or file that ``source`` names, downloaded when need be; see `open_source`.

    Raises RequestError when there is none, SdvinoError when the hub cannot be reached.
    """
    path = user_path(source)
    if _exists(path):
        if revision is not None:
            raise _revision_of_folder(path)
        return path
    return _on_hub(
        source,
        download,
        revision=revision,
        offline=offline,
        max_download=max_download,
        report=report,
    )


def is_here(source: Path | str) -> bool:
    """Tell whether ``source`` is a folder or a file, rather than on the hub or nowhere."""
    return _exists(user_path(source))


def _revision_of_folder(path: object) -> RequestError:
    return RequestError(
        f"--revision is for models on the hub, and {path} is here; leave the option out."
    )


def _on_hub(source: Path | str, get: Callable[..., _Found], **options: Any) -> _Found:
    """Return what ``get`` finds on the hub; raises RequestError for what is no hub id."""
    text = str(source)
    if isinstance(source, Path) or not is_hub_source(text):
        raise RequestError(
            f"{text[:200]} does not exist, and it is no hub id (owner/name) either; give a"
            " diffusers or OpenVINO folder, a .safetensors checkpoint, or a hub id."
        )
    return get(text, **options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def _of_file(
    file: SingleFile, name: str | None, work: Path, tokenizer: Path | None
) -> DiffusersFolder:
    """Return the checkpoint ``file`` as a diffusers folder whose weights are still in it."""
    vocabulary = find_vocabulary(tokenizer, tokens=file.tokens)
    return DiffusersFolder.open(
        file.outline(work / OUTLINE, vocabulary),
        name=file.name if name is None else name.removesuffix(".safetensors"),
        packed=file.components,
    )
