"""`sdvino.json`: what sdvino knows about a folder that it converted."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.inputs.files import read_json, sha256_of
from sdvino.settings import COMPONENTS, SAMPLERS, SamplerName

MANIFEST_FILE = "sdvino.json"
MANIFEST_FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
#: Bytes of a file beside the components: a vocabulary has some MB.
MAX_AROUND_BYTES = 64 * 2**20
#: What of a folder running reads beside its components.
_AROUND = ("model_index.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggested:
    """What gives a good first picture; None where the model says nothing."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: SamplerName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestComponent:
    """One component: how it was compressed, and the files it consists of."""

    #: As the recipe calls it: fp16, int8-weights, int8 ...
    precision: str
    #: All its files together.
    bytes: int
    #: File name inside the component's folder to 64 hexadecimal digits.
    sha256: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path, precision: str) -> ManifestComponent:
        """Read size and checksums of the files in the component's ``folder``."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return cls(
            precision=precision,
            bytes=sum(path.stat().st_size for path in files),
            sha256={path.name: sha256_of(path) for path in files},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `sdvino.json`."""

    #: Name of the model it was made from, never a path.
    source: str
    family: str
    recipe: str
    components: Mapping[str, ManifestComponent]
    #: What else running reads (tokenizers, scheduler, index): name in the folder to its SHA-256.
    files: Mapping[str, str] = field(default_factory=dict)
    #: What the compression cost the picture, as `sdvino convert` measured it.
    quality: Mapping[str, Any] | None = None
    suggested: Suggested = field(default_factory=Suggested)
    #: What was baked in: LoRAs with their weights, another autoencoder; names, never paths.
    baked: Mapping[str, Any] = field(default_factory=dict)
    #: What was done to the weights before they were exported, in order, with figures.
    passes: tuple[Mapping[str, Any], ...] = ()
    #: The kind of machine that its 8-bit activations are made for; None: there are none.
    target: str | None = None
    #: Tool to version.
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest of ``folder``, or None without one; raises ModelFolderError."""
        path = folder / MANIFEST_FILE
        return cls.from_dict(read_json(path, MANIFEST_FILE)) if os.path.lexists(path) else None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Manifest:
        """Check and take a parsed manifest. Unknown keys are left alone, as newer sdvinos add some.

        Raises ModelFolderError for a wrong type, an unknown component or a newer format.
        """
        version = _get(value, "format_version", int)
        if version != MANIFEST_FORMAT:
            raise ModelFolderError(
                f"{MANIFEST_FILE} has format {version} and this sdvino knows {MANIFEST_FORMAT};"
                " update sdvino, or remove the file to run the folder without it."
            )
        components = _get(value, "components", dict)
        for name in components:
            if name not in COMPONENTS:
                raise _wrong(f"names a component {name[:80]!r}")
        return cls(
            source=_get(value, "source", str),
            family=_get(value, "family", str),
            recipe=_get(value, "recipe", str),
            components={name: _component(name, entry) for name, entry in components.items()},
            files=_sums("files", _get(value, "files", dict, {}), "/"),
            quality=None if value.get("quality") is None else _get(value, "quality", dict),
            suggested=_suggested(value.get("suggested", {})),
            baked=_get(value, "baked", dict, {}),
            passes=_passes(value),
            target=_get(value, "target", str, None),
            versions={
                str(tool): str(version)
                for tool, version in _get(value, "versions", dict, {}).items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, ready for `json.dump`."""
        suggested = self.suggested
        return {
            "format_version": MANIFEST_FORMAT,
            "source": self.source,
            "family": self.family,
            "recipe": self.recipe,
            "components": {
                name: {
                    "precision": entry.precision,
                    "bytes": entry.bytes,
                    "sha256": dict(entry.sha256),
                }
                for name, entry in self.components.items()
            },
            **({"files": dict(self.files)} if self.files else {}),
            "quality": None if self.quality is None else dict(self.quality),
            "suggested": {
                name: value
                for name in ("num_inference_steps", "guidance_scale", "scheduler")
                if (value := getattr(suggested, name)) is not None
            },
            **({"baked": dict(self.baked)} if self.baked else {}),
            **({"passes": [dict(entry) for entry in self.passes]} if self.passes else {}),
            **({} if self.target is None else {"target": self.target}),
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def files_around(folder: Path) -> list[str]:
    """Return the names of what running a model reads beside its components."""
    paths = sorted(path for pattern in _AROUND for path in folder.glob(pattern))
    return [path.relative_to(folder).as_posix() for path in paths]


def checksums_around(folder: Path) -> dict[str, str]:
    """Return name and SHA-256 of each of `files_around`."""
    return {name: sha256_of(folder / name) for name in files_around(folder)}


def _component(name: str, entry: object) -> ManifestComponent:
    if not isinstance(entry, dict):
        raise _wrong(f"has no object for {name}")
    sums = _sums(name, _get(entry, "sha256", dict))
    size = _get(entry, "bytes", int)
    if size < 0:
        raise _wrong(f"says that {name} has {size} bytes")
    return ManifestComponent(precision=_get(entry, "precision", str), bytes=size, sha256=sums)


def _sums(name: str, sums: dict[str, Any], separator: str = "") -> dict[str, str]:
    """Return the checksums listed under ``name``, checked; ``separator`` allows for folders."""
    for file, digest in sums.items():
        parts = file.split(separator) if separator else [file]
        if any(_FILE_NAME.fullmatch(part) is None for part in parts):
            raise _wrong(f"lists a file {file[:80]!r}, which is no plain file name")
        if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
            raise _wrong(f"has a checksum for {name}/{file[:80]} that is no SHA-256")
    return sums


def _passes(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    found = _get(value, "passes", list, [])
    if not all(isinstance(entry, dict) for entry in found):
        raise _wrong("has `passes` that are no objects")
    return tuple(found)


def _suggested(value: object) -> Suggested:
    if not isinstance(value, dict):
        raise _wrong("has a `suggested` that is no object")
    steps = _get(value, "num_inference_steps", int, None)
    guidance = _get(value, "guidance_scale", (int, float), None)
    scheduler = _get(value, "scheduler", str, None)
    if steps is not None and not 1 <= steps <= 1000:
        raise _wrong(f"suggests {steps} steps")
    if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= 1000):
        raise _wrong(f"suggests a guidance_scale of {guidance}")
    if scheduler is not None and scheduler not in SAMPLERS:
        raise _wrong(f"suggests a scheduler {scheduler[:80]!r} that this sdvino does not have")
    return Suggested(
        num_inference_steps=steps,
        guidance_scale=None if guidance is None else float(guidance),
        scheduler=scheduler,
    )


_REQUIRED = object()


def _get(
    value: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: object = _REQUIRED
) -> Any:
    """Return ``value[key]`` after checking its type; bool counts as no number."""
    found = value.get(key, default)
    if found is _REQUIRED:
        raise _wrong(f"has no {key!r}")
    if found is default or (isinstance(found, kind) and not isinstance(found, bool)):
        return found
    raise _wrong(f"has a {key!r} of the wrong type ({type(found).__name__})")


def _wrong(what: str) -> ModelFolderError:
    return ModelFolderError(
        f"{MANIFEST_FILE} {what}; convert the model again, or remove the file to run without it."
    )
