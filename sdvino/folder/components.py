"""One component of a model folder on disk: its graph, its weights and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.families import FAMILIES
from sdvino.inputs.files import check_inside, read_json
from sdvino.inputs.ir import IrSummary, read_ir

_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae_decoder": "AutoencoderKL",
    "vae_encoder": "AutoencoderKL",
    "tiny_vae": "AutoencoderTiny",
}


@dataclass(frozen=True, slots=True)
class ComponentFiles:
    """One component on disk."""

    name: str
    xml: Path
    bin: Path
    #: The component's config.json, an object without NaN or infinities.
    config: Mapping[str, Any]
    #: Of the .xml and the .bin together.
    bytes: int
    ir: IrSummary

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The files that running reads."""
        return self.xml, self.bin, self.xml.with_name("config.json")


def read_component(folder: Path, name: str) -> ComponentFiles:
    """Read the component ``name`` of ``folder``.

    Raises ModelFolderError when a file is missing or damaged, leads out of the folder, or belongs
    to another kind of component.
    """
    xml = folder / name / "openvino_model.xml"
    weights = xml.with_suffix(".bin")
    for path in (xml, weights, folder / name / "config.json"):
        check_inside(path, folder)
    ir = read_ir(xml, weights, name)
    config = read_json(folder / name / "config.json", f"{name}/config.json")
    expected = _CLASSES.get(name)
    stated = config.get("_class_name", expected)
    if stated != expected:
        raise ModelFolderError(
            f"{name}/config.json is that of {str(stated)[:80]!r}, not of {expected};"
            f" use a model of {FAMILIES}."
        )
    size = xml.stat().st_size + weights.stat().st_size
    return ComponentFiles(name=name, xml=xml, bin=weights, config=config, bytes=size, ir=ir)
