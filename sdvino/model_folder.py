"""What a model folder is: an index, components in sub-folders, configurations, and a manifest.

The layout is that of diffusers and optimum-intel: ``model_index.json``, and for each component
``<component>/openvino_model.xml`` with ``.bin`` and ``config.json``. Everything in a folder was
written by somebody else, so everything is checked here, before memory is taken or OpenVINO reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import ModelFolderError
from sdvino.files import check_inside, read_json, sha256_of
from sdvino.ir import IrSummary, read_ir
from sdvino.manifest import Manifest, ManifestComponent, Suggested
from sdvino.settings import COMPONENTS

__all__ = ["ComponentFiles", "Manifest", "ManifestComponent", "ModelFolder", "Suggested"]

INDEX_FILE = "model_index.json"
_FAMILY = "Stable Diffusion 1.x and 2.x"
#: optimum-intel writes its own class names, which are diffusers' with OV before them.
_PIPELINES = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    }
)
_REQUIRED = ("text_encoder", "unet", "vae_decoder")
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae_decoder": "AutoencoderKL",
    "vae_encoder": "AutoencoderKL",
    "tiny_vae": "AutoencoderTiny",
}
#: Input channels of UNets that take more than the latents -> what they are for.
_SPECIAL_UNETS = {9: "inpainting", 8: "picture editing (InstructPix2Pix)", 5: "depth-to-image"}
_UNET_INPUTS = frozenset({"sample", "timestep", "encoder_hidden_states"})
#: Weights of torch: a folder with these and no IR is yet to be converted.
_TORCH_FILES = ("*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*.bin")


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


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder that has been looked through; make one with `ModelFolder.open`."""

    path: Path
    model_index: Mapping[str, Any]
    components: Mapping[str, ComponentFiles]
    scheduler_config: Mapping[str, Any]
    manifest: Manifest | None
    #: Channels of the latents, which the UNet takes and gives.
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
    #: Width of the text states.
    cross_attention_dim: int
    #: Tokens that the text encoder reads, 77.
    text_length: int

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Look through the folder ``path``.

        Raises ModelFolderError, which says what to do, when it is no model folder, not one of a
        model that sdvino runs, incomplete, damaged, or contradicts itself.
        """
        folder = Path(path)
        index = _read_index(folder)
        components = {
            name: _read_component(folder, name)
            for name in COMPONENTS
            if (folder / name).is_dir() and _wanted(folder, name)
        }
        for name in _REQUIRED:
            if name not in components:
                raise _missing(folder, name)
        _check_tokenizers(folder, components)
        sizes = _Sizes(components)
        sizes.check()
        return cls(
            path=folder,
            model_index=index,
            components=components,
            scheduler_config=_read_inside(folder, "scheduler/scheduler_config.json"),
            manifest=_read_manifest(folder),
            latent_channels=sizes.latent_channels,
            vae_scale_factor=sizes.vae_scale_factor,
            scaling_factor=sizes.scaling_factor,
            shift_factor=sizes.shift_factor,
            height=sizes.native[0] * sizes.vae_scale_factor,
            width=sizes.native[1] * sizes.vae_scale_factor,
            cross_attention_dim=sizes.cross_attention_dim,
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
    def in_channels(self) -> int:
        """Channels that the UNet takes; the same as `latent_channels` in the models run here."""
        return self.latent_channels

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

    def verify(self) -> None:
        """Compare every file that the manifest lists with its SHA-256.

        A folder without a manifest has nothing to compare with. Raises ModelFolderError.
        """
        if self.manifest is None:
            return
        for name, component in self.manifest.components.items():
            for file, expected in component.sha256.items():
                path = self.path / name / file
                check_inside(path, self.path)
                if not path.is_file():
                    raise ModelFolderError(f"{name}/{file} is missing; get the model again.")
                if sha256_of(path) != expected:
                    raise ModelFolderError(
                        f"{name}/{file} is not the file that sdvino.json was written for: its"
                        " SHA-256 differs; get the model again."
                    )


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
    if name.removeprefix("OV") not in _PIPELINES:
        raise ModelFolderError(
            f"This is a model for {name[:80]}, which sdvino does not run; use one of {_FAMILY}."
        )
    return index


def _read_inside(folder: Path, file: str) -> dict[str, Any]:
    check_inside(folder / file, folder)
    return read_json(folder / file, file)


def _read_manifest(folder: Path) -> Manifest | None:
    check_inside(folder / "sdvino.json", folder)
    return Manifest.read(folder)


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


def _read_component(folder: Path, name: str) -> ComponentFiles:
    xml = folder / name / "openvino_model.xml"
    weights = xml.with_suffix(".bin")
    for path in (xml, weights, folder / name / "config.json"):
        check_inside(path, folder)
    ir = read_ir(xml, weights, name)
    config = _read_inside(folder, f"{name}/config.json")
    expected = _CLASSES.get(name)
    stated = config.get("_class_name", expected)
    if stated != expected:
        raise ModelFolderError(
            f"{name}/config.json is that of {str(stated)[:80]!r}, not of {expected};"
            f" use a model of {_FAMILY}."
        )
    size = xml.stat().st_size + weights.stat().st_size
    return ComponentFiles(name=name, xml=xml, bin=weights, config=config, bytes=size, ir=ir)


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


class _Sizes:
    """The numbers in the configurations, with diffusers' defaults, held against the graphs."""

    def __init__(self, components: Mapping[str, ComponentFiles]) -> None:
        self._components = components
        self.in_channels = self._integer("unet", "in_channels", 4, 64)
        self.out_channels = self._integer("unet", "out_channels", 4, 64)
        self.cross_attention_dim = self._integer("unet", "cross_attention_dim", 1280, 16384)
        self.native = self._native_size()
        self.latent_channels = self._integer("vae_decoder", "latent_channels", 4, 64)
        self.vae_scale_factor = 2 ** (self._vae_levels() - 1)
        self.scaling_factor = self._scaling_factor()
        self.shift_factor = self._shift_factor()
        self.text_length = self._integer("text_encoder", "max_position_embeddings", 77, 4096)
        self.text_width = self._integer(
            "text_encoder", "hidden_size", self.cross_attention_dim, 16384
        )

    def check(self) -> None:
        """Raise ModelFolderError where two files contradict each other."""
        special = _SPECIAL_UNETS.get(self.in_channels)
        if special is not None and self.latent_channels == 4:
            raise ModelFolderError(
                f"This UNet was made for {special} and takes {self.in_channels} channels;"
                " sdvino makes pictures from text alone, so use an ordinary text-to-image model."
            )
        for name, stated in (
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ):
            self._agree("unet", name, stated, "vae_decoder", self.latent_channels)
        self._agree(
            "unet", "cross_attention_dim", self.cross_attention_dim, "text_encoder", self.text_width
        )
        self._check_inputs()
        self._graph("unet", "in_channels", self.in_channels, "sample", 4, 1)
        self._graph(
            "unet", "cross_attention_dim", self.cross_attention_dim, "encoder_hidden_states", 3, 2
        )
        self._graph("vae_decoder", "latent_channels", self.latent_channels, "latent_sample", 4, 1)
        self._graph("text_encoder", "max_position_embeddings", self.text_length, "input_ids", 2, 1)
        self._graph("tiny_vae", "latent_channels", self.latent_channels, "latent_sample", 4, 1)

    def _agree(self, part: str, name: str, value: int, other: str, found: int) -> None:
        if value != found:
            raise ModelFolderError(
                f"{part}/config.json says {name} is {value}, but {other}/config.json says"
                f" {found}; the parts are not of one model, so get the model again."
            )

    def _check_inputs(self) -> None:
        for names in self._components["unet"].ir.input_names:
            if not names & _UNET_INPUTS:
                raise ModelFolderError(
                    f"The UNet wants an input {'/'.join(sorted(names))[:80]!r} that sdvino does not"
                    f" give; use a model of {_FAMILY} without it."
                )

    def _graph(self, part: str, name: str, value: int, port: str, rank: int, axis: int) -> None:
        """Hold ``value`` against dimension ``axis`` of the input ``port``, where it is fixed."""
        if part not in self._components:
            return
        shape = self._components[part].ir.inputs.get(port)
        if shape is None:
            raise ModelFolderError(
                f"{part}/openvino_model.xml has no input {port!r}, so it is another kind of model;"
                " get the model again."
            )
        if len(shape) != rank or shape[axis] not in (None, value):
            raise ModelFolderError(
                f"{part}/config.json says {name} is {value}, but {part}/openvino_model.xml takes"
                f" {port} {list(shape)}; the two do not belong together, so get the model again."
            )

    def _integer(self, part: str, name: str, default: int, limit: int) -> int:
        value = self._components[part].config.get(name, default)
        # diffusers allows one number for every block; in these models they are all the same.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise _wrong(part, name, value, f"a whole number from 1 to {limit}")
        return value

    def _native_size(self) -> tuple[int, int]:
        size = self._components["unet"].config.get("sample_size")
        sides = size if isinstance(size, list) else [64 if size is None else size] * 2
        if len(sides) != 2 or not all(type(n) is int and 1 <= n <= 1024 for n in sides):
            raise _wrong("unet", "sample_size", size, "a whole number from 1 to 1024")
        return sides[0], sides[1]

    def _vae_levels(self) -> int:
        blocks = self._components["vae_decoder"].config.get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= 7:
            raise _wrong("vae_decoder", "block_out_channels", blocks, "a list of 1 to 7 numbers")
        return len(blocks)

    def _scaling_factor(self) -> float:
        value = self._components["vae_decoder"].config.get("scaling_factor", 0.18215)
        if not _is_number(value) or not 1e-6 < abs(value) < 1e6:
            raise _wrong("vae_decoder", "scaling_factor", value, "a number such as 0.18215")
        return float(value)

    def _shift_factor(self) -> float | None:
        value = self._components["vae_decoder"].config.get("shift_factor")
        if value is not None and (not _is_number(value) or abs(value) > 1e6):
            raise _wrong("vae_decoder", "shift_factor", value, "a number or null")
        return None if value is None else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(part: str, name: str, value: object, expected: str) -> ModelFolderError:
    return ModelFolderError(
        f"{part}/config.json says {name} is {str(value)[:40]!r}; it must be {expected},"
        " so get the model again."
    )
