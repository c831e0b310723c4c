"""Another autoencoder in a model's place: a folder of diffusers', or a single file in any naming.

A single file becomes a folder with a config and the same weights under diffusers' names; the bytes
of the weights are copied as they are, and torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvino.convert import autoencoder_names as names
from sdvino.convert.lora_file import listed
from sdvino.convert.tensor_file import Renamed, TensorFile, write_renamed
from sdvino.errors import RequestError
from sdvino.inputs.files import check_all_inside, read_json

if TYPE_CHECKING:
    from sdvino.convert.source import DiffusersFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"
_MAX_STAGES = 8
_MAX_WIDTH = 8192
_DEFAULT_SCALING = 0.18215
# The defaults of diffusers' classes, for what a config leaves out.
_KL_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_TINY_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "encoder_block_out_channels": (64,) * 4,
    "decoder_block_out_channels": (64,) * 4,
}
# What a file does not tell and the model's own autoencoder does: how its latents are scaled, and
# how the norms group channels.
_INHERITED = (
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "sample_size",
    "force_upcast",
    "norm_num_groups",
)


def replace_vae(source: DiffusersFolder, path: Path, work: Path) -> DiffusersFolder:
    """Return ``source`` with the AutoencoderKL in ``path``, a folder or a .safetensors file.

    A file's folder is written to ``work``/vae. Raises RequestError for anything else, for latents
    of another size, scale or number of channels, and for weights that are missing or NaN.
    """
    option = "--vae"
    if path.is_dir():
        folder = _folder(path, "AutoencoderKL", "vae", option)
        _check_folder(folder, _KL_DEFAULTS, names.kl_tensors)
    else:
        file = TensorFile.open(path, "a VAE")
        if names.is_original(file.tensors):
            renamed = names.from_original(file.tensors)
        else:
            renamed = {name: names.modern(name) for name in file.tensors}
        config = _write(
            work / "vae", [(file, renamed)], names.kl_config, names.kl_tensors, "AutoencoderKL"
        )
        own = source.configs["vae"]
        config |= {name: own[name] for name in _INHERITED if name in own}
        folder = _finish(work / "vae", config)
    config = read_json(folder / "config.json", "config.json of the VAE")
    _check_latents(source, config, path, _stages(config, "block_out_channels", 1))
    _check_scaling(source, config, path)
    return _with_folder(source, "vae", folder)


def replace_tiny_vae(source: DiffusersFolder, path: Path, work: Path) -> DiffusersFolder:
    """Return ``source`` with the AutoencoderTiny in ``path`` beside its autoencoder.

    ``path`` is a diffusers folder, a .safetensors file in diffusers' naming, or either of TAESD's
    own two files (NAME_encoder, NAME_decoder) with the other beside it, or their folder.
    A file's folder is written to ``work``/tiny_vae. Raises RequestError as `replace_vae` does.
    """
    option = "--tiny-vae"
    if path.is_dir() and not _is_pair(path):
        folder = _folder(path, "AutoencoderTiny", "tiny_vae", option)
        _check_folder(folder, _TINY_DEFAULTS, names.tiny_tensors)
    else:
        config = _write(
            work / "tiny_vae",
            _tiny_files(path),
            names.tiny_config,
            names.tiny_tensors,
            "AutoencoderTiny",
        )
        folder = _finish(work / "tiny_vae", config)
    config = read_json(folder / "config.json", "config.json of the tiny VAE")
    factor = config.get("upsampling_scaling_factor", 2)
    if factor not in (1, 2, 4):
        raise RequestError(
            f"{path} enlarges by {str(factor)[:40]} a stage; it should be 2, so get it again."
        )
    _check_latents(source, config, path, _stages(config, "num_decoder_blocks", 4), factor)
    return _with_folder(source, "tiny_vae", folder)


def _folder(path: Path, class_name: str, inside: str, option: str) -> Path:
    """Return the folder of the autoencoder; of a whole pipeline, the one inside."""
    check_all_inside(path)
    if (path / "model_index.json").is_file() and not (path / "config.json").is_file():
        path = path / inside
    if not (path / "config.json").is_file():
        raise RequestError(
            f"{path} has no config.json, so it is no {class_name} of diffusers;"
            f" give {option} such a folder or a .safetensors file."
        )
    found = read_json(path / "config.json", "config.json").get("_class_name", class_name)
    if found != class_name:
        raise RequestError(
            f"{path} holds {str(found)[:80]}; {option} takes an {class_name} of diffusers."
        )
    return path


def _check_folder(
    folder: Path,
    defaults: Mapping[str, Any],
    tensors_of: Callable[[Mapping[str, Any]], dict[str, names.Shape]],
) -> None:
    """Raise RequestError when tensors that the config asks for are missing or of another shape.

    diffusers would make up what is missing, at random. Unusual blocks are left to it.
    """
    config = {**defaults, **read_json(folder / "config.json", "config.json of the autoencoder")}
    kinds = {
        str(kind)
        for key in ("down_block_types", "up_block_types")
        if isinstance(config.get(key), list)
        for kind in config[key]
    }
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        return
    for key, default in defaults.items():
        values = config[key] if isinstance(default, (list, tuple)) else [config[key]]
        kind = type(default[0] if isinstance(default, (list, tuple)) else default)
        valid = isinstance(values, (list, tuple)) and 1 <= len(values) <= _MAX_STAGES
        if not valid or any(type(v) is not kind or not 0 <= v <= _MAX_WIDTH for v in values):
            raise RequestError(
                f"{folder / 'config.json'} gives {key} as {str(config[key])[:40]}, which cannot be;"
                " get the autoencoder again."
            )
    found = {
        new: names.modern_shape(new, info.shape)
        for file in sorted(folder.glob("*.safetensors"))
        for old, info in TensorFile.open(file, "the autoencoder").tensors.items()
        for new in [names.modern(old)]
    }
    try:
        expected = tensors_of(config)
    except ValueError as error:
        raise RequestError(
            f"{folder / 'config.json'} gives lists of different lengths; get the autoencoder again."
        ) from error
    wrong = sorted(name for name, shape in expected.items() if found.get(name) != shape)
    if found and wrong:
        raise RequestError(
            f"{folder} is no whole autoencoder: tensors are missing or of another shape"
            f" ({listed(wrong)}); download it again or choose another."
        )


def _with_folder(source: DiffusersFolder, name: str, folder: Path) -> DiffusersFolder:
    replaced = source.with_folder(name, folder)
    for weights in replaced.weights[name]:
        TensorFile.open(weights, "the autoencoder").check_finite()
    return replaced


def _write(
    folder: Path,
    files: Sequence[tuple[TensorFile, Mapping[str, str]]],
    config_of: Callable[[names.Shapes], dict[str, Any]],
    tensors_of: Callable[[Mapping[str, Any]], dict[str, names.Shape]],
    what: str,
) -> dict[str, Any]:
    """Write the tensors of ``files`` under their new names; return the config read off them."""
    tensors = [
        Renamed(file, old, new, names.modern_shape(new, file.tensors[old].shape))
        for file, renamed in files
        for old, new in renamed.items()
    ]
    shapes = {tensor.new: tensor.shape for tensor in tensors}
    where = " and ".join(str(file.path) for file, _ in files)
    try:
        config = config_of(shapes)
        expected = tensors_of(config)
    except (KeyError, IndexError) as error:
        raise RequestError(
            f"{where} holds no {what} ({listed(sorted(shapes))} are in it);"
            f" give the file of one, encoder and decoder together."
        ) from error
    wrong = sorted(
        name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
    )
    if wrong or len(shapes) < len(tensors):
        raise RequestError(
            f"{where} is no whole {what}: tensors are missing, left over or of another shape"
            f" ({listed(wrong)}); download it again or choose another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_renamed(tensors, folder / WEIGHTS)
    return config


def _finish(folder: Path, config: Mapping[str, Any]) -> Path:
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def _is_pair(folder: Path) -> bool:
    return not (folder / "config.json").is_file() and len(_halves(folder)) == 2


def _halves(folder: Path) -> dict[str, Path]:
    """Return TAESD's own files in ``folder``, by side, where there is one of each."""
    found = {side: sorted(folder.glob(f"*{side}*.safetensors")) for side in _SIDES}
    return {side: files[0] for side, files in found.items() if len(files) == 1}


_SIDES = ("encoder", "decoder")


def _tiny_files(path: Path) -> list[tuple[TensorFile, Mapping[str, str]]]:
    """Return the file, or TAESD's two, with diffusers' names for what is in them."""
    if path.is_dir():
        halves = _halves(path)
    else:
        file = TensorFile.open(path, "a tiny VAE")
        if any(name.startswith(("encoder.", "decoder.")) for name in file.tensors):
            return [(file, {name: name for name in file.tensors})]
        halves = {}
        side = next((side for side in _SIDES if side in path.name), None)
        if side is not None:
            halves = {s: path.with_name(path.name.replace(side, s)) for s in _SIDES}
    if len(halves) < 2:
        raise RequestError(
            f"{path} is named neither as diffusers names an AutoencoderTiny nor as TAESD does"
            " (taesd_encoder.safetensors and taesd_decoder.safetensors, side by side)."
        )
    files = [(side, TensorFile.open(half, f"a tiny VAE's {side}")) for side, half in halves.items()]
    return [(file, names.from_taesd(file.tensors, side)) for side, file in files]


def _check_latents(
    source: DiffusersFolder,
    config: Mapping[str, Any],
    path: Path,
    stages: int,
    factor: int = 2,
) -> None:
    """Raise RequestError unless latents have the same channels and size as the model's own."""
    own = source.configs["vae"]
    channels, ours = config.get("latent_channels", 4), own.get("latent_channels", 4)
    if channels != ours:
        raise RequestError(
            f"{path} makes latents of {str(channels)[:40]} channels, and this model's have {ours};"
            " choose an autoencoder of the same family."
        )
    size, expected = factor ** (stages - 1), 2 ** (_stages(own, "block_out_channels", 1) - 1)
    if size != expected:
        raise RequestError(
            f"{path} makes latents of 1/{size} of the picture's size, and this model's have"
            f" 1/{expected}; choose an autoencoder of the same family."
        )


def _check_scaling(source: DiffusersFolder, config: Mapping[str, Any], path: Path) -> None:
    """Raise RequestError for another scale: the UNet was trained on latents of the model's own.

    The scale is what tells Stable Diffusion XL's autoencoder from 1.x's.
    """
    scale = config.get("scaling_factor", _DEFAULT_SCALING)
    ours = source.configs["vae"].get("scaling_factor", _DEFAULT_SCALING)
    if scale != ours:
        raise RequestError(
            f"{path} scales its latents by {str(scale)[:40]} and this model's by {ours}, so it"
            " belongs to another family; choose an autoencoder of the same family."
        )


def _stages(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_STAGES:
        raise RequestError(
            f"An autoencoder's config.json gives {key} as {str(value)[:40]}; it should be a list"
            f" of 1 to {_MAX_STAGES} numbers, so get the autoencoder again."
        )
    return len(value)
