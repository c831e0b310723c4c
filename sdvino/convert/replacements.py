"""Another autoencoder in a model's place: a folder of diffusers', or a single file in any naming.

A single file's config is read off its tensors, which stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvino.errors import RequestError
from sdvino.inputs.files import check_all_inside, read_json
from sdvino.weights.autoencoder import differing, kl_tensors, read_kl, read_tiny, tiny_tensors
from sdvino.weights.layouts import autoencoder as layout
from sdvino.weights.layouts.diffusers import component_tensors, weight_files
from sdvino.weights.layouts.rename import LayoutError, listed
from sdvino.weights.numbers import check_finite
from sdvino.weights.safetensors import Shape, Tensor, TensorFile

if TYPE_CHECKING:
    from sdvino.convert.source import DiffusersFolder

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


def replace_vae(source: DiffusersFolder, path: Path) -> DiffusersFolder:
    """Return ``source`` with the AutoencoderKL in ``path``, a folder or a .safetensors file.

    Raises RequestError for anything else, for latents of another size, scale or number of
    channels, and for weights that are missing or NaN.
    """
    if path.is_dir():
        folder = _folder(path, "AutoencoderKL", "vae", "--vae")
        config = _check_folder(folder, _KL_DEFAULTS, kl_tensors)
    else:
        folder = None
        try:
            tensors = layout.current(TensorFile.open(path, "a VAE").tensors)
        except LayoutError as error:
            raise RequestError(f"{path} is no AutoencoderKL: {error} twice.") from error
        own = source.configs["vae"]
        config = read_kl(tensors, path) | {name: own[name] for name in _INHERITED if name in own}
    _check_latents(source, config, path, _stages(config, "block_out_channels", 1))
    _check_scaling(source, config, path)
    if folder is None:
        replaced = source.with_tensors("vae", config, tensors)
    else:
        replaced = source.with_folder("vae", folder)
    check_finite(replaced.tensors("vae"), path)
    return replaced


def replace_tiny_vae(source: DiffusersFolder, path: Path) -> DiffusersFolder:
    """Return ``source`` with the AutoencoderTiny in ``path`` beside its autoencoder.

    ``path`` is a diffusers folder, a .safetensors file in diffusers' naming, or either of TAESD's
    own two files (NAME_encoder, NAME_decoder) with the other beside it, or their folder.
    Raises RequestError as `replace_vae` does.
    """
    if path.is_dir() and not _is_pair(path):
        folder = _folder(path, "AutoencoderTiny", "tiny_vae", "--tiny-vae")
        config = _check_folder(folder, _TINY_DEFAULTS, tiny_tensors)
    else:
        folder = None
        tensors = _tiny_tensors(path)
        config = read_tiny(tensors, path)
    factor = config.get("upsampling_scaling_factor", 2)
    if factor not in (1, 2, 4):
        raise RequestError(
            f"{path} enlarges by {str(factor)[:40]} a stage; it should be 2, so get it again."
        )
    _check_latents(source, config, path, _stages(config, "num_decoder_blocks", 4), factor)
    if folder is None:
        replaced = source.with_tensors("tiny_vae", config, tensors)
    else:
        replaced = source.with_folder("tiny_vae", folder)
    check_finite(replaced.tensors("tiny_vae"), path)
    return replaced


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
    tensors_of: Callable[[Mapping[str, Any]], dict[str, Shape]],
) -> dict[str, Any]:
    """Return the config of the autoencoder in ``folder``.

    Raises RequestError when tensors that it asks for are missing or of another shape. Unusual
    blocks are left to whoever builds them.
    """
    own = read_json(folder / "config.json", "config.json of the autoencoder")
    config = {**defaults, **own}
    kinds = {
        str(kind)
        for key in ("down_block_types", "up_block_types")
        if isinstance(config.get(key), list)
        for kind in config[key]
    }
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        return own
    for key, default in defaults.items():
        values = config[key] if isinstance(default, (list, tuple)) else [config[key]]
        kind = type(default[0] if isinstance(default, (list, tuple)) else default)
        valid = isinstance(values, (list, tuple)) and 1 <= len(values) <= _MAX_STAGES
        if not valid or any(type(v) is not kind or not 0 <= v <= _MAX_WIDTH for v in values):
            raise RequestError(
                f"{folder / 'config.json'} gives {key} as {str(config[key])[:40]}, which cannot be;"
                " get the autoencoder again."
            )
    files = weight_files(folder) if any(folder.glob("*.safetensors")) else ()
    found = component_tensors("vae", files)
    try:
        expected = tensors_of(config)
    except ValueError as error:
        raise RequestError(
            f"{folder / 'config.json'} gives lists of different lengths; get the autoencoder again."
        ) from error
    wrong = [name for name in differing(found, expected) if name in expected]
    if found and wrong:
        raise RequestError(
            f"{folder} is no whole autoencoder: tensors are missing or of another shape"
            f" ({listed(wrong)}); download it again or choose another."
        )
    return own


def _is_pair(folder: Path) -> bool:
    return not (folder / "config.json").is_file() and len(_halves(folder)) == 2


def _halves(folder: Path) -> dict[str, Path]:
    """Return TAESD's own files in ``folder``, by side, where there is one of each."""
    found = {side: sorted(folder.glob(f"*{side}*.safetensors")) for side in _SIDES}
    return {side: files[0] for side, files in found.items() if len(files) == 1}


_SIDES = ("encoder", "decoder")


def _tiny_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the file ``path``, or of TAESD's two, as diffusers calls them."""
    if path.is_dir():
        halves = _halves(path)
    else:
        tensors = TensorFile.open(path, "a tiny VAE").tensors
        if any(name.startswith(("encoder.", "decoder.")) for name in tensors):
            return dict(tensors)
        side = next((side for side in _SIDES if side in path.name), None)
        both = () if side is None else _SIDES
        halves = {half: path.with_name(path.name.replace(str(side), half)) for half in both}
    if len(halves) < 2:
        raise RequestError(
            f"{path} is named neither as diffusers names an AutoencoderTiny nor as TAESD does"
            " (taesd_encoder.safetensors and taesd_decoder.safetensors, side by side)."
        )
    found: dict[str, Tensor] = {}
    for side, half in halves.items():
        file = TensorFile.open(half, f"a tiny VAE's {side}")
        found |= layout.taesd_tensors(file.tensors, side)
    return found


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
