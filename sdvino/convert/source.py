"""The source of a conversion: a diffusers folder, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdvino.convert.families import PIPELINE_CLASSES, Family, find_family
from sdvino.convert.lora_file import Lora
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.files import read_json

PROMPTS_FILE = "calibration_prompts.txt"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Sizes beyond these are no Stable Diffusion model, and would only eat memory.
_LIMITS = {
    "sample_size": 512,
    "cross_attention_dim": 8192,
    "latent_channels": 64,
    "hidden_size": 8192,
    "num_hidden_layers": 128,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, slots=True)
class DiffusersFolder:
    """A checked diffusers folder of the Stable Diffusion 1.x / 2.x family."""

    path: Path
    #: The folder's name, never its path.
    name: str
    family: Family
    model_index: Mapping[str, Any]
    #: Sub-folder -> its config.json (scheduler: scheduler_config.json).
    configs: Mapping[str, Mapping[str, Any]]
    #: Sub-folder -> its safetensors files.
    weights: Mapping[str, tuple[Path, ...]]
    #: What the UNet predicts: epsilon, v_prediction or sample.
    prediction_type: str
    has_tiny_vae: bool
    #: Sub-folders that stand elsewhere than in ``path``.
    folders: Mapping[str, Path] = field(default_factory=dict)
    #: What is merged into the weights when a component is loaded.
    loras: tuple[Lora, ...] = ()

    @classmethod
    def open(cls, path: Path) -> DiffusersFolder:
        """Read and check ``path``; raises RequestError, in one sentence, for anything else."""
        index = _read_index(path)
        _check_classes(path, index)
        folders = ["text_encoder", "unet", "vae"]
        has_tiny_vae = (path / "tiny_vae").is_dir()
        if has_tiny_vae:
            folders.append("tiny_vae")
        configs = {name: _read_config(path, name, "config.json") for name in folders}
        _check_configs(path, configs)
        configs["scheduler"] = _read_config(path, "scheduler", "scheduler_config.json")
        scheduler = SchedulerConfig.from_dict(configs["scheduler"])
        _check_tokenizer(path)
        return cls(
            path=path,
            name=path.resolve().name,
            family=find_family(configs["unet"]["cross_attention_dim"]),
            model_index=index,
            configs=configs,
            weights={name: _find_weights(path / name) for name in folders},
            prediction_type=scheduler.for_sampler("ddim").prediction_type,
            has_tiny_vae=has_tiny_vae,
        )

    @property
    def components(self) -> dict[str, str]:
        """Return our components and the sub-folders that hold their weights."""
        tiny = {"tiny_vae": "tiny_vae"} if self.has_tiny_vae else {}
        return {**self.family.components, **tiny}

    def folder(self, name: str) -> Path:
        """Return where the sub-folder ``name`` stands."""
        return self.folders.get(name, self.path / name)

    def with_folder(self, name: str, folder: Path) -> DiffusersFolder:
        """Return the source with the sub-folder ``name`` (config.json and weights) from ``folder``.

        Raises RequestError when the folder is incomplete or does not fit the rest of the model.
        """
        configs = {**self.configs, name: read_json(folder / "config.json", f"{name}/config.json")}
        _check_configs(self.path, configs)
        return replace(
            self,
            configs=configs,
            weights={**self.weights, name: _find_weights(folder)},
            has_tiny_vae=self.has_tiny_vae or name == "tiny_vae",
            folders={**self.folders, name: folder},
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents at the model's own size."""
        unet = self.configs["unet"]
        return unet["in_channels"], unet["sample_size"], unet["sample_size"]

    def bytes_of(self, folder: str) -> int:
        """Return the size of a sub-folder's weights."""
        return sum(file.stat().st_size for file in self.weights[folder])


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


def _check_classes(path: Path, index: Mapping[str, Any]) -> None:
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise RequestError(
            f"{path} holds a {str(pipeline)[:80]}; convert takes"
            f" {' and '.join(PIPELINE_CLASSES)} (Stable Diffusion 1.x and 2.x)."
        )
    family = find_family(0)
    for folder, expected in family.classes.items():
        entry = index.get(folder)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if str(name).removesuffix("Fast") != expected:
            raise RequestError(
                f"model_index.json of {path} names {str(name)[:80]} for {folder};"
                f" convert knows {expected} there."
            )


def _read_config(path: Path, folder: str, file: str) -> Mapping[str, Any]:
    config = path / folder / file
    if not config.is_file():
        raise RequestError(
            f"{path} has no {folder}/{file}; download the source model again, complete."
        )
    return read_json(config, f"{folder}/{file}")


def _check_configs(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    unet, text, vae = configs["unet"], configs["text_encoder"], configs["vae"]
    for folder, config, names in (
        ("unet", unet, ("in_channels", "sample_size", "cross_attention_dim")),
        ("text_encoder", text, ("hidden_size", "num_hidden_layers", "vocab_size")),
        ("vae", vae, ("latent_channels",)),
    ):
        for name in names:
            value, limit = config.get(name), _LIMITS.get(name, 8192)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise RequestError(
                    f"{folder}/config.json of {path} gives {name} as {str(value)[:40]};"
                    f" it should be a whole number from 1 to {limit}."
                )
    if unet["in_channels"] != vae["latent_channels"]:
        raise RequestError(
            f"The UNet of {path} takes {unet['in_channels']} channels and the VAE makes"
            f" {vae['latent_channels']}; convert takes text-to-image models, where they agree."
        )
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise RequestError(
            f"The UNet of {path} attends to text {unet['cross_attention_dim']} wide and its text"
            f" encoder gives {text['hidden_size']}; the two belong to different models."
        )


def _check_tokenizer(path: Path) -> None:
    folder = path / "tokenizer"
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not pair and not (folder / "tokenizer.json").is_file():
        raise RequestError(
            f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt;"
            " download the source model again, complete."
        )


def _find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors of one variant: the plain one, or else fp16's."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name and "non_ema" not in file.name]
    half = [file for file in files if ".fp16" in file.name and "non_ema" not in file.name]
    chosen = plain if plain else half
    if chosen:
        return tuple(_check_safetensors(file) for file in chosen)
    if any(next(folder.glob(pattern), None) is not None for pattern in _PICKLES):
        raise RequestError(
            f"{folder} holds its weights as a pickle, which can run code when it is opened;"
            " get the .safetensors version of the model."
        )
    raise RequestError(f"{folder} holds no .safetensors weights; download the source model again.")


def _check_safetensors(file: Path) -> Path:
    """Read the header alone: it says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return file
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{file} is damaged or not a safetensors file; download the source model again."
        ) from error
