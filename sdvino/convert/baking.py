"""What is baked into a model as it is converted: LoRAs, another autoencoder, a tiny one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdvino.convert.open_source import Source
from sdvino.convert.openvino_source import OpenVinoFolder
from sdvino.convert.replacements import replace_tiny_vae, replace_vae
from sdvino.errors import RequestError
from sdvino.weights.layouts.lora import COMPONENTS
from sdvino.weights.lora import check_weight, open_lora, parse_lora
from sdvino.weights.lora_merge import check_loras, hints

_log = logging.getLogger("sdvino")


@dataclass(frozen=True, slots=True)
class BakingRequest:
    """What was asked for; every field is something that JSON holds."""

    #: ``FILE[:WEIGHT]`` each.
    loras: tuple[str, ...] = ()
    #: Folder or file.
    vae: str | None = None
    tiny_vae: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files and folders that the result is made from."""
        replaced = tuple(Path(path) for path in (self.vae, self.tiny_vae) if path is not None)
        return tuple(parse_lora(text)[0] for text in self.loras) + replaced

    def to_manifest(self) -> dict[str, Any]:
        """Return what sdvino.json says of it: names and weights, never paths."""
        loras = [(path.stem, weight) for path, weight in map(parse_lora, self.loras)]
        told: dict[str, Any] = {
            "loras": [{"name": name, "weight": weight} for name, weight in loras],
            "vae": None if self.vae is None else _name(self.vae),
            "tiny_vae": None if self.tiny_vae is None else _name(self.tiny_vae),
        }
        return {key: value for key, value in told.items() if value}


def _name(path: str) -> str:
    real = Path(path).resolve()
    return real.stem if real.is_file() else real.name


def bake(source: Source, request: BakingRequest, *, say: bool = True) -> Source:
    """Return ``source`` with what ``request`` asks for; torch is not needed yet.

    Autoencoders take the place of the source's; LoRAs are opened, held against the source's
    headers, and carried along to be merged when a component is loaded. Nothing is written. Doing it
    again gives the same; ``say`` False then leaves out what is logged: parts of a LoRA that fit
    nothing, and a hint about LCM-LoRAs. Raises RequestError for what does not fit.
    """
    if isinstance(source, OpenVinoFolder):
        if request != BakingRequest():
            raise RequestError(
                f"{source.name} is an OpenVINO model, whose weights are fixed; bake LoRAs and"
                " autoencoders into the checkpoint that it was made from."
            )
        return source
    loras = tuple(open_lora(*parse_lora(text)) for text in request.loras)
    # Of weights on the hub nothing is known yet.
    known = [part for part in COMPONENTS if part in source.weights or part in source.packed]
    if loras and known:
        tensors = {part: source.tensors(part) for part in known}
        told = (*check_loras(loras, tensors), *hints(loras))
        for sentence in told if say else ():
            _log.warning(sentence)
    if request.vae is not None:
        source = replace_vae(source, Path(request.vae))
    if request.tiny_vae is not None:
        source = replace_tiny_vae(source, Path(request.tiny_vae))
    return replace(source, loras=(*source.loras, *loras))


def baking_request(
    loras: Sequence[str | Path | tuple[str | Path, float]] = (),
    vae: str | Path | None = None,
    tiny_vae: str | Path | None = None,
) -> BakingRequest:
    """Return the request for what `convert` takes, with absolute paths.

    A LoRA is a path, ``FILE:WEIGHT`` or (path, weight). Raises RequestError for a weight that is
    none.
    """
    pairs = [
        (Path(value[0]), check_weight(value[1]))
        if isinstance(value, tuple)
        else parse_lora(str(value))
        for value in loras
    ]
    return BakingRequest(
        loras=tuple(f"{path.absolute()}:{weight!r}" for path, weight in pairs),
        vae=None if vae is None else str(Path(vae).absolute()),
        tiny_vae=None if tiny_vae is None else str(Path(tiny_vae).absolute()),
    )
