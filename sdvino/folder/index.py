"""What a model folder is: an index, components in sub-folders, configurations, and a manifest.

The layout is that of diffusers and optimum-intel: ``model_index.json``, and for each component
``<component>/openvino_model.xml`` with ``.bin`` and ``config.json``. Everything in a folder was
written by somebody else, so everything is checked here, before memory is taken or OpenVINO reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.families import FAMILIES, PIPELINE_KINDS, SPECIAL_UNETS, PipelineKind
from sdvino.folder.components import ComponentFiles, Sizes, read_component
from sdvino.folder.manifest import (
    MANIFEST_FILE,
    MAX_AROUND_BYTES,
    Manifest,
    ManifestComponent,
    Suggested,
    files_around,
)
from sdvino.inputs.digests import wrong_file
from sdvino.inputs.files import check_inside, open_file, read_json, sha256_of
from sdvino.settings import COMPONENTS

__all__ = [
    "ComponentFiles",
    "Manifest",
    "ManifestComponent",
    "ModelFolder",
    "Suggested",
    "Verified",
]

INDEX_FILE = "model_index.json"
#: Weights of torch: a folder with these and no IR is yet to be converted.
_TORCH_FILES = ("*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder that has been looked through; make one with `ModelFolder.open`."""

    path: Path
    model_index: Mapping[str, Any]
    #: What the class in the index stands for.
    kind: PipelineKind
    components: Mapping[str, ComponentFiles]
    scheduler_config: Mapping[str, Any]
    manifest: Manifest | None
    #: Channels that the UNet takes; more than `latent_channels` in models for inpainting.
    in_channels: int
    #: Channels of the latents, which the UNet gives.
    latent_channels: int
    #: Pixels to a latent, along each side.
    vae_scale_factor: int
    #: Latents are multiplied by it after encoding (diffusers' AutoencoderKL).
    scaling_factor: float
    #: Subtracted from latents before scaling; most models have none.
    shift_factor: float | None
    #: Size of the pictures that the model was trained on, in pixels.
    height: int
    width: int
    #: Width of the text states, all text encoders' together.
    cross_attention_dim: int
    #: Width of the pooled text state that the UNet takes beside them; None where it takes none.
    pooled_width: int | None
    #: Width of the embedded guidance scale (LCM) that the UNet takes; None where it takes none.
    guidance_width: int | None
    #: Tokens that each text encoder reads, 77.
    text_length: int

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Look through the folder ``path``.

        Raises ModelFolderError, which says what to do, when it is no model folder, not one of a
        model that sdvino runs, incomplete, damaged, or contradicts itself.
        """
        folder = Path(path)
        index = _read_index(folder)
        kind = PIPELINE_KINDS[str(index["_class_name"]).removeprefix("OV")]
        components = {
            name: read_component(folder, name)
            for name in COMPONENTS
            if (folder / name).is_dir() and _wanted(folder, name)
        }
        for name in (*kind.text_encoders, "unet", "vae_decoder"):
            if name not in components:
                raise _missing(folder, name)
        _check_tokenizers(folder, components)
        sizes = Sizes(components, kind)
        sizes.check()
        return cls(
            path=folder,
            model_index=index,
            kind=kind,
            components=components,
            scheduler_config=_read_inside(folder, "scheduler/scheduler_config.json"),
            manifest=_read_manifest(folder, components),
            in_channels=sizes.in_channels,
            latent_channels=sizes.latent_channels,
            vae_scale_factor=sizes.vae_scale_factor,
            scaling_factor=sizes.scaling_factor,
            shift_factor=sizes.shift_factor,
            height=sizes.native[0] * sizes.vae_scale_factor,
            width=sizes.native[1] * sizes.vae_scale_factor,
            cross_attention_dim=sizes.cross_attention_dim,
            pooled_width=sizes.pooled_width,
            guidance_width=sizes.guidance_width,
            text_length=sizes.text_length,
        )

    @property
    def name(self) -> str:
        """The model's name: the manifest's source, or the folder's name (a hub id in its cache)."""
        if self.manifest is not None:
            return self.manifest.source
        above = self.path.absolute().parent
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            return above.parent.name.removeprefix("models--").replace("--", "/")
        return self.path.resolve().name

    @property
    def refusal(self) -> str | None:
        """Why no picture can be made from text alone with this model; None where it can."""
        if self.in_channels == self.latent_channels:
            return None
        return (
            f"This UNet was made for {SPECIAL_UNETS[self.in_channels]} and takes"
            f" {self.in_channels} channels; sdvino makes pictures from text alone, so use an"
            " ordinary text-to-image model."
        )

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether zeros stand for a negative prompt that was not given (SDXL, unless it says no).

        Source: force_zeros_for_empty_prompt of diffusers' StableDiffusionXLPipeline.
        """
        stated = self.model_index.get("force_zeros_for_empty_prompt", True)
        return self.kind.added_conditions and stated is not False

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, as the scheduler's configuration says (default: epsilon)."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def suggested(self) -> Suggested:
        """What the manifest suggests; nothing without a manifest."""
        return Suggested() if self.manifest is None else self.manifest.suggested

    def tokenizer(self, text_encoder: str = "text_encoder") -> Path:
        """Return the tokenizer folder that belongs to ``text_encoder``."""
        return self.path / text_encoder.replace("text_encoder", "tokenizer")

    def recorded(self, component: str) -> Mapping[str, str]:
        """Return the SHA-256 that the manifest gives for the files of ``component``, by name."""
        entry = None if self.manifest is None else self.manifest.components.get(component)
        return {} if entry is None else entry.sha256

    def verify(self) -> Verified:
        """Compare every file that the manifest lists with its SHA-256; return what was compared.

        Raises ModelFolderError when one differs, and when there is nothing to compare with: no
        manifest, or one that leaves out a file of a component.
        """
        if self.manifest is None:
            raise ModelFolderError(
                f"{self.path} has no sdvino.json, so there is nothing to compare its files with."
            )
        listed = dict(self.manifest.files)
        for name, component in self.manifest.components.items():
            listed |= {f"{name}/{file}": digest for file, digest in component.sha256.items()}
        read = [path for files in self.components.values() for path in files.paths]
        for path in read:
            name = path.relative_to(self.path).as_posix()
            if name not in listed:
                raise ModelFolderError(
                    f"sdvino.json does not list {name}, so nothing tells whether it is the right"
                    " file; get the model again, or convert it again."
                )
        size = 0
        for name, expected in listed.items():
            path = self.path / name
            check_inside(path, self.path)
            # Those of components are as long as the manifest says, which was seen when it was read.
            limit = MAX_AROUND_BYTES if name in self.manifest.files else None
            with open_file(path, name, limit=limit) as file:
                size += os.fstat(file.fileno()).st_size
            if sha256_of(path, limit=limit) != expected:
                raise wrong_file(name)
        unlisted = tuple(name for name in files_around(self.path) if name not in listed)
        return Verified(files=len(listed), bytes=size, unlisted=unlisted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `ModelFolder.verify` compared."""

    #: Files that are as the manifest has them, and their bytes together.
    files: int
    bytes: int
    #: Files that running reads and the manifest does not list.
    unlisted: tuple[str, ...]


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ModelFolderError(f"{folder} {what}; give the folder of a converted model.")
    except OSError as error:  # a name too long, or not permitted to look
        raise ModelFolderError(f"{folder} cannot be opened ({error.strerror}).") from error
    if not (folder / INDEX_FILE).exists():
        raise ModelFolderError(
            f"{folder} has no {INDEX_FILE}, so it is not a model folder;"
            " make one with `sdvino convert SOURCE FOLDER`."
        )
    index = _read_inside(folder, INDEX_FILE)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ModelFolderError(f"{INDEX_FILE} does not name a pipeline; get the model again.")
    if name.removeprefix("OV") not in PIPELINE_KINDS:
        raise ModelFolderError(
            f"This is a model for {name[:80]}, which sdvino does not run; use one of {FAMILIES}."
        )
    return index


def _read_inside(folder: Path, file: str) -> dict[str, Any]:
    check_inside(folder / file, folder)
    return read_json(folder / file, file)


def _read_manifest(folder: Path, components: Mapping[str, ComponentFiles]) -> Manifest | None:
    """Read the manifest, and hold the sizes that it gives against the files."""
    check_inside(folder / MANIFEST_FILE, folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    for name, entry in manifest.components.items():
        files = components.get(name)
        if files is None or not all(path.name in entry.sha256 for path in files.paths):
            continue
        try:
            size = sum((folder / name / file).stat().st_size for file in entry.sha256)
        except OSError as error:
            raise ModelFolderError(
                f"A file of {name} that sdvino.json lists cannot be read ({error.strerror});"
                " get the model again."
            ) from error
        if size != entry.bytes:
            raise ModelFolderError(
                f"The files of {name} have {size:,} bytes together, and sdvino.json says"
                f" {entry.bytes:,}; get the model again."
            )
    return manifest


def _wanted(folder: Path, name: str) -> bool:
    """Return whether the sub-folder ``name`` is to be read: it holds an IR, or at least half."""
    return any(
        (folder / name / f"openvino_model{suffix}").is_symlink()
        or (folder / name / f"openvino_model{suffix}").exists()
        for suffix in (".xml", ".bin")
    )


def _missing(folder: Path, name: str) -> ModelFolderError:
    parts = [folder / name, folder / "unet", folder / "vae", folder / "text_encoder"]
    if any(part.is_dir() and any(part.glob(p)) for part in parts for p in _TORCH_FILES):
        return ModelFolderError(
            f"{folder} holds torch weights, not an OpenVINO model;"
            f" convert it first: sdvino convert {folder} NEW_FOLDER"
        )
    return ModelFolderError(
        f"{folder} has no {name}/openvino_model.xml; get the model again, or convert it again."
    )


def _check_tokenizers(folder: Path, components: Mapping[str, ComponentFiles]) -> None:
    for name in components:
        if not name.startswith("text_encoder"):
            continue
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        check_inside(tokenizer, folder)
        if not tokenizer.is_dir():
            raise ModelFolderError(f"{tokenizer.name} is missing; get the model again.")
        for path in tokenizer.iterdir():
            check_inside(path, folder)
