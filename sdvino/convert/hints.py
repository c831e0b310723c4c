"""What neither names nor shapes of a checkpoint's tensors tell: prediction type, size, steps.

Taken, in this order, from the person, from marks that trainers leave in the file (its metadata, a
tensor called v_pred), from a .yaml beside it, and last from the file's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sdvino.errors import RequestError
from sdvino.inputs.files import read_bytes
from sdvino.weights.safetensors import TensorFile

_MAX_YAML_BYTES = 2**20
_SIZES = range(256, 2049)


@dataclass(frozen=True, slots=True)
class Hints:
    """What the surroundings of a checkpoint say; None where they say nothing."""

    #: epsilon or v_prediction.
    prediction_type: str | None
    #: Pixels along a side that it was trained on.
    native_size: int | None
    #: Steps that a distilled model was made for.
    steps: int | None
    #: Trained with a noise schedule that ends in noise alone.
    zero_snr: bool
    #: File name and titles, for `Facts.names`.
    names: str


def read_hints(header: TensorFile, prediction_type: str | None = None) -> Hints:
    """Collect the hints of a checkpoint; ``prediction_type`` is the person's word."""
    told = header.metadata
    keys = ("modelspec.title", "modelspec.architecture", "ss_base_model_version")
    names = " ".join([header.path.stem, *(told.get(key, "")[:200] for key in keys)])
    return Hints(
        prediction_type=_prediction_type(header, names)
        if prediction_type is None
        else prediction_type,
        native_size=_size(told.get("modelspec.resolution", "")),
        steps=_steps(names),
        zero_snr="ztsnr" in header.tensors,
        names=names,
    )


def _prediction_type(header: TensorFile, names: str) -> str | None:
    told = header.metadata.get("modelspec.prediction_type", "")
    if told in ("v", "v_prediction") or "v_pred" in header.tensors:
        return "v_prediction"
    if told in ("epsilon", "eps"):
        return "epsilon"
    beside = _parameterization(header.path.with_suffix(".yaml"))
    if beside is not None:
        return beside
    if re.search(r"v[-_. ]?pred|768[-_. ]?v\b|v2-?[01]?_768", names, re.IGNORECASE):
        return "v_prediction"
    if re.search(r"512[-_. ]?base|v2[-_.]?512|turbo|inpaint|eps[-_. ]?pred", names, re.IGNORECASE):
        return "epsilon"
    return None


def _parameterization(path: Path) -> str | None:
    """Return what the model's own .yaml says, if there is one; it is searched, not parsed."""
    try:
        text = read_bytes(path, limit=_MAX_YAML_BYTES).decode("utf-8", "replace")
    except RequestError:
        return None
    match = re.search(r"^[ \t]*parameterization:[ \t]*[\"']?(v|eps)\b", text, re.MULTILINE)
    if match is None:
        return "epsilon" if re.search(r"^[ \t]*unet_config:", text, re.MULTILINE) else None
    return "v_prediction" if match[1] == "v" else "epsilon"


def _size(text: str) -> int | None:
    match = re.fullmatch(r"\s*(\d{3,4})(?:x\d{3,4})?\s*", text)
    size = 0 if match is None else int(match[1])
    return size if size in _SIZES and size % 8 == 0 else None


def _steps(names: str) -> int | None:
    match = re.search(r"(?<!\d)([1-9]\d?)[-_ ]?steps?", names, re.IGNORECASE)
    return None if match is None else int(match[1])
