"""The source of a conversion: a diffusers folder, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sdvino.convert.families import (
    FAMILIES,
    PIPELINE_CLASSES,
    TITLES,
    Family,
    find_family,
    read_facts,
    tokenizer_of,
)
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.inputs.files import check_all_inside, read_json
from sdvino.weights.layouts.diffusers import component_tensors, weight_files
from sdvino.weights.lora import Lora
from sdvino.weights.safetensors import Tensors

# Sizes beyond these are no Stable Diffusion model, and would only eat memory.
_LIMITS = {
    "sample_size": 512,
    "cross_attention_dim": 8192,
    "latent_channels": 64,
    "hidden_size": 8192,
    "num_hidden_layers": 128,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 4096,
    "projection_dim": 8192,
    "time_cond_proj_dim": 8192,
    "addition_time_embed_dim": 8192,
}
# A mask and the latents of a masked picture, beside the latents themselves.
_INPAINTING_CHANNELS = 9
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFolder:
    """A checked folder of a family that sdvino knows."""

    path: Path
    #: The model's name, never its path.
    name: str
    family: Family
    model_index: Mapping[str, Any]
    #: Sub-folder -> its config.json (scheduler: scheduler_config.json).
    configs: Mapping[str, Mapping[str, Any]]
    #: Sub-folder -> its files of weights.
    weights: Mapping[str, tuple[Path, ...]]
    #: What the UNet predicts: epsilon, v_prediction or sample.
    prediction_type: str
    has_tiny_vae: bool
    #: Sub-folder -> bytes of its weights, where they are elsewhere yet: such a source is an
    #: outline, good for telling what a conversion would take.
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Return the sub-folders of the tokenizers, one for each text encoder."""
        return tuple(tokenizer_of(name) for name in self.family.text_encoders)

    def folder(self, name: str) -> Path:
        """Return where the sub-folder ``name`` stands."""
        return self.path / name

    def bytes_of(self, folder: str) -> int:
        """Return the size of a sub-folder's weights."""
        if folder in self.elsewhere:
            return self.elsewhere[folder]
        return sum(file.stat().st_size for file in self.weights[folder])


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersFolder(SourceFolder):
    """A checked diffusers folder."""

    #: Sub-folders that stand elsewhere than in ``path``.
    folders: Mapping[str, Path] = field(default_factory=dict)
    #: What is merged into the weights when a component is loaded.
    loras: tuple[Lora, ...] = ()
    #: Sub-folder -> its tensors, where they are in a file of another layout.
    packed: Mapping[str, Tensors] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        name: str | None = None,
        elsewhere: Mapping[str, int] | None = None,
        packed: Mapping[str, Tensors] | None = None,
    ) -> DiffusersFolder:
        """Read and check ``path``; raises RequestError, in one sentence, for anything else.

        ``name`` is the model's, where the folder's says nothing (a hub's cache, a work folder).
        With ``elsewhere`` the folder holds no weights: sub-folder to their bytes. With ``packed``
        neither: sub-folder to their tensors, which are in a file.
        """
        index = _read_index(path)
        check_all_inside(path)
        text_encoders = _check_classes(path, index)
        folders = [*text_encoders, "unet", "vae"]
        has_tiny_vae = (path / "tiny_vae").is_dir()
        if has_tiny_vae:
            folders.append("tiny_vae")
        away = {} if elsewhere is None else elsewhere
        for folder in folders:
            if elsewhere is not None and not elsewhere.get(folder):
                raise RequestError(
                    f"{path if name is None else name} has no .safetensors weights for {folder};"
                    " choose another model."
                )
        configs = {name: _read_config(path, name, "config.json") for name in folders}
        _check_configs(path, configs, text_encoders)
        configs["scheduler"] = _read_config(path, "scheduler", "scheduler_config.json")
        for text_encoder in text_encoders:
            _check_tokenizer(path / tokenizer_of(text_encoder))
        own_name = path.resolve().name if name is None else name
        facts = read_facts(
            configs["unet"],
            configs["text_encoder"],
            configs["scheduler"],
            " ".join([own_name, str(index.get("_name_or_path"))]),
        )
        return cls(
            path=path,
            name=own_name,
            family=find_family(facts),
            model_index=index,
            configs=configs,
            weights={}
            if packed is not None
            else {name: weight_files(path / name) for name in folders if name not in away},
            prediction_type=prediction_of(configs["scheduler"]),
            has_tiny_vae=has_tiny_vae,
            elsewhere={part: away[part] for part in folders if part in away},
            packed={} if packed is None else packed,
        )

    @property
    def components(self) -> dict[str, str]:
        """Return our components and the sub-folders that hold their weights."""
        tiny = {"tiny_vae": "tiny_vae"} if self.has_tiny_vae else {}
        return {**self.family.components, **tiny}

    def folder(self, name: str) -> Path:
        """Return where the sub-folder ``name`` stands."""
        return self.folders.get(name, self.path / name)

    def tensors(self, folder: str) -> Tensors:
        """Return the tensors of a sub-folder, in the naming of today and their own types.

        Headers alone are read. LoRAs are not merged yet (see `sdvino.weights.lora_merge`).
        """
        if folder in self.packed:
            return self.packed[folder]
        return component_tensors(folder, self.weights[folder])

    def with_folder(self, name: str, folder: Path) -> DiffusersFolder:
        """Return the source with the sub-folder ``name`` (config.json and weights) from ``folder``.

        Raises RequestError when the folder is incomplete or does not fit the rest of the model.
        """
        source = self._with_config(name, read_json(folder / "config.json", f"{name}/config.json"))
        return replace(
            source,
            weights={**source.weights, name: weight_files(folder)},
            folders={**source.folders, name: folder},
        )

    def with_tensors(
        self, name: str, config: Mapping[str, Any], tensors: Tensors
    ) -> DiffusersFolder:
        """Return the source with ``tensors`` and their ``config`` for the sub-folder ``name``.

        Raises RequestError when they do not fit the rest of the model.
        """
        source = self._with_config(name, config)
        return replace(source, packed={**source.packed, name: tensors})

    def _with_config(self, name: str, config: Mapping[str, Any]) -> DiffusersFolder:
        """Return the source with another config for ``name``, and without its weights."""
        configs = {**self.configs, name: config}
        _check_configs(self.path, configs, self.family.text_encoders)
        return replace(
            self,
            configs=configs,
            weights=_without(self.weights, name),
            has_tiny_vae=self.has_tiny_vae or name == "tiny_vae",
            folders=_without(self.folders, name),
            elsewhere=_without(self.elsewhere, name),
            packed=_without(self.packed, name),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents at the model's own size."""
        side = self.configs["unet"]["sample_size"]
        return self.configs["vae"]["latent_channels"], side, side

    def bytes_of(self, folder: str) -> int:
        """Return the size of a sub-folder's weights."""
        if folder in self.packed and folder not in self.elsewhere:
            return sum(tensor.bytes for tensor in self.packed[folder].values())
        return SourceFolder.bytes_of(self, folder)


def prediction_of(scheduler: Mapping[str, Any]) -> str:
    """Return what the UNet predicts by its scheduler_config.json; raises RequestError."""
    return SchedulerConfig.from_dict(scheduler).for_sampler("ddim").prediction_type


def _without(table: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    return {key: value for key, value in table.items() if key != name}


def _read_index(path: Path) -> dict[str, Any]:
    if path.is_file():
        raise RequestError(
            f"{path} is a file; convert takes a diffusers folder (one with model_index.json)."
        )
    if not path.is_dir():
        raise RequestError(f"{path} does not exist; give a diffusers folder to convert.")
    if not (path / "model_index.json").is_file():
        raise RequestError(
            f"{path} has no model_index.json, so it is not a diffusers folder;"
            " give the folder that diffusers' save_pretrained wrote."
        )
    if (path / "unet" / "openvino_model.xml").is_file():
        raise RequestError(f"{path} is an OpenVINO model already; use it with `sdvino generate`.")
    return read_json(path / "model_index.json", "model_index.json")


def _check_classes(path: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Check the classes that model_index.json names and return the text encoders' sub-folders."""
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise RequestError(f"{path} holds a {str(pipeline)[:80]}; convert takes {TITLES}.")
    if index.get("requires_aesthetics_score") or (
        "XL" in pipeline and _class_of(index, "text_encoder") == "None"
    ):
        raise RequestError(
            f"{path} holds SDXL's refiner, which only finishes another model's latents;"
            " give the base model."
        )
    encoders = 2 if "XL" in pipeline else 1
    family = next(family for family in FAMILIES if len(family.text_encoders) == encoders)
    for folder, expected in family.classes.items():
        name = _class_of(index, folder)
        if name.removesuffix("Fast") != expected:
            raise RequestError(
                f"model_index.json of {path} names {name[:80]} for {folder};"
                f" convert knows {expected} there."
            )
    return family.text_encoders


def _class_of(index: Mapping[str, Any], folder: str) -> str:
    entry = index.get(folder)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "None"


def _read_config(path: Path, folder: str, file: str) -> Mapping[str, Any]:
    config = path / folder / file
    if not config.is_file():
        raise RequestError(
            f"{path} has no {folder}/{file}; download the source model again, complete."
        )
    return read_json(config, f"{folder}/{file}")


def _check_configs(
    path: Path, configs: Mapping[str, Mapping[str, Any]], text_encoders: Sequence[str]
) -> None:
    unet, vae = configs["unet"], configs["vae"]
    _check_numbers(path, "unet", unet, ("in_channels", "sample_size", "cross_attention_dim"))
    _check_numbers(path, "vae", vae, ("latent_channels",))
    for name in text_encoders:
        _check_numbers(
            path, name, configs[name], ("hidden_size", "num_hidden_layers", "vocab_size")
        )
    if unet["in_channels"] not in (vae["latent_channels"], _INPAINTING_CHANNELS):
        raise RequestError(
            f"The UNet of {path} takes {unet['in_channels']} channels and the VAE makes"
            f" {vae['latent_channels']}; convert takes text-to-image models, where they agree, and"
            f" inpainting ones, which take {_INPAINTING_CHANNELS}."
        )
    widths = [configs[name]["hidden_size"] for name in text_encoders]
    if unet["cross_attention_dim"] != sum(widths):
        gives = f"encoder gives {widths[0]}" if len(widths) == 1 else f"encoders give {widths}"
        raise RequestError(
            f"The UNet of {path} attends to text {unet['cross_attention_dim']} wide and its text"
            f" {gives}; the two belong to different models."
        )
    _check_conditioning(path, configs, text_encoders)


def _check_conditioning(
    path: Path, configs: Mapping[str, Mapping[str, Any]], text_encoders: Sequence[str]
) -> None:
    """Check what the UNet is told beside the text and the timestep."""
    unet = configs["unet"]
    wanted = "text_time" if len(text_encoders) == 2 else None
    added = unet.get("addition_embed_type")
    other = next((unet[key] for key in _OTHER_CONDITIONING if unet.get(key) is not None), None)
    if added != wanted or other is not None:
        raise RequestError(
            f"The UNet of {path} is conditioned on {str(added if other is None else other)[:40]},"
            f" beside the text; convert knows {wanted} there, so give another model."
        )
    if unet.get("time_cond_proj_dim") is not None:
        _check_numbers(path, "unet", unet, ("time_cond_proj_dim",))
    if wanted is None:
        return
    _check_numbers(
        path,
        "unet",
        unet,
        ("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    )
    _check_numbers(path, "text_encoder_2", configs["text_encoder_2"], ("projection_dim",))
    pooled = configs["text_encoder_2"]["projection_dim"]
    taken = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    if taken != pooled:
        raise RequestError(
            f"The UNet of {path} takes pooled text {taken} wide and its second text encoder gives"
            f" {pooled}; the two belong to different models."
        )


# Class labels, and pictures or projected text in place of the text's states.
_OTHER_CONDITIONING = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


def _check_numbers(
    path: Path, folder: str, config: Mapping[str, Any], names: Sequence[str]
) -> None:
    for name in names:
        value, limit = config.get(name), _LIMITS.get(name, 8192)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise RequestError(
                f"{folder}/config.json of {path} gives {name} as {str(value)[:40]};"
                f" it should be a whole number from 1 to {limit}."
            )


def _check_tokenizer(folder: Path) -> None:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not pair and not (folder / "tokenizer.json").is_file():
        raise RequestError(
            f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt;"
            " download the source model again, complete."
        )
