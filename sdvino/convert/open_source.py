"""Whatever people have, opened: a folder, a single file or a hub id becomes a checked source."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from sdvino.convert.clip_vocabulary import find_vocabulary
from sdvino.convert.hub_source import download, is_hub_source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.progress import Progress, silent
from sdvino.convert.single_file import SingleFile
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.hub import Report, report_to_stderr
from sdvino.settings import check_choice

Source: TypeAlias = DiffusersFolder | OpenVinoFolder

#: What a single file's UNet may be said to predict.
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction")
#: Sub-folder of the work folder that a single file is unpacked into.
UNPACKED = "unpacked"


def open_source(
    source: Path | str,
    work: Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    name: str | None = None,
    progress: Progress = silent,
    report: Report = report_to_stderr,
) -> Source:
    """Return the checked source that ``source`` names.

    source: a diffusers folder, an OpenVINO folder, a .safetensors checkpoint, or, as a str, a model
    on the hub (owner/name, owner/name/FILE.safetensors); what exists on the disk goes before it.
    work: a folder for what is unpacked from a single file; it must stay until the conversion is
    done, and what an earlier conversion of the same file left there is used again.
    revision, offline: of the hub. tokenizer: a folder with CLIP's vocabulary, for single files.
    prediction_type: epsilon or v_prediction, for single files that do not say. name: the model's,
    where ``source`` is what `resolve_source` returned for a hub id.
    progress: told what is being unpacked. report: told, in a line, what is about to be downloaded.

    Raises RequestError, in one sentence, for what cannot be converted.
    """
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    path = resolve_source(source, revision=revision, offline=offline, report=report)
    if name is None and not _exists(Path(source).expanduser()):
        name = str(source)
    if path.is_file():
        return _unpacked(path, name, work, tokenizer, prediction_type, progress)
    for value, option in ((tokenizer, "--tokenizer"), (prediction_type, "--prediction-type")):
        if value is not None:
            raise RequestError(
                f"{option} is for single files, and {source} is a folder, which says that itself;"
                " leave the option out."
            )
    if (path / "unet" / "openvino_model.xml").is_file():
        return OpenVinoFolder.open(path, name=name)
    return DiffusersFolder.open(path, name=name)


def resolve_source(
    source: Path | str,
    *,
    revision: str | None = None,
    offline: bool = False,
    report: Report = report_to_stderr,
) -> Path:
    """Return the folder or file that ``source`` names, downloaded when need be; see `open_source`.

    Raises RequestError when there is none, SdvinoError when the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if _exists(path):
        if revision is not None:
            raise RequestError(
                f"--revision is for models on the hub, and {path} is here; leave the option out."
            )
        return path
    text = str(source)
    if isinstance(source, Path) or not is_hub_source(text):
        raise RequestError(
            f"{text[:200]} does not exist, and it is no hub id (owner/name) either; give a"
            " diffusers or OpenVINO folder, a .safetensors checkpoint, or a hub id."
        )
    return download(text, revision=revision, offline=offline, report=report)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def _unpacked(
    path: Path,
    name: str | None,
    work: Path,
    tokenizer: Path | None,
    prediction_type: str | None,
    progress: Progress,
) -> DiffusersFolder:
    file = SingleFile.open(path, prediction_type=prediction_type)
    vocabulary = find_vocabulary(tokenizer, tokens=file.tokens)
    folder = file.unpack(work / UNPACKED, vocabulary, progress)
    own = file.name if name is None else name.removesuffix(".safetensors")
    return DiffusersFolder.open(folder, name=own)
