"""A component that is no longer what its config.json describes, on the disk and in memory.

Its folder holds config.json, safetensors, and `structure.json`: what to do to the module that the
config describes, so that the weights fit it. That file was written by somebody else: its names
must exist, its counts be possible, and every shape must agree with the safetensors header before
a weight is read. Without it a folder is a plain one of diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdvino.compress.component_weights import (
    WEIGHTS_FILE,
    Dtype,
    fill,
    shapes_in,
    weight_files,
    write_weights,
)
from sdvino.errors import RequestError
from sdvino.inputs.files import read_json

STRUCTURE_FILE = "structure.json"
_FORMAT = 1
#: A UNet of Stable Diffusion XL has about 2,500 modules.
_MOST_NAMES = 20_000
_MOST = 2**20


@dataclass(frozen=True, slots=True)
class Structure:
    """What is different from the config, by the names of modules. Empty: nothing."""

    #: Residual blocks (ResnetBlock2D) and attention blocks (Transformer2DModel) that are gone.
    removed: tuple[str, ...] = ()
    #: Attention -> heads left.
    heads: Mapping[str, int] = field(default_factory=dict)
    #: Feed-forward -> channels left between its two layers.
    channels: Mapping[str, int] = field(default_factory=dict)
    #: Linear layer or convolution -> rank of the two in its place.
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Structure | None:
        """Return the structure of the component in ``folder``, None without a file.

        Raises RequestError for a file that is none.
        """
        path = folder / STRUCTURE_FILE
        if not path.exists():
            return None
        value = read_json(path, STRUCTURE_FILE)
        if value.get("format_version") != _FORMAT:
            raise _wrong(f"has the format {str(value.get('format_version'))[:20]}")
        removed = value.get("removed", [])
        if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
            raise _wrong("has no list of names under `removed`")
        if len(set(removed)) != len(removed) or len(removed) > _MOST_NAMES:
            raise _wrong("removes something twice, or too much")
        tables = {key: _counts(key, value.get(key, {})) for key in ("heads", "channels", "ranks")}
        return cls(tuple(removed), **tables)

    def without(self, block: str) -> Structure:
        """Return the structure with ``block`` gone, and what was said of the parts of it."""

        def others(table: Mapping[str, int]) -> dict[str, int]:
            return {
                name: count for name, count in table.items() if not name.startswith(f"{block}.")
            }

        return Structure(
            (*self.removed, block), others(self.heads), others(self.channels), others(self.ranks)
        )

    def write(self, folder: Path) -> None:
        """Write what `read` reads."""
        value = {
            "format_version": _FORMAT,
            "removed": list(self.removed),
            "heads": dict(self.heads),
            "channels": dict(self.channels),
            "ranks": dict(self.ranks),
        }
        text = json.dumps(value, indent=1) + "\n"
        (folder / STRUCTURE_FILE).write_text(text, encoding="utf-8")

    def apply(self, module: Any) -> None:
        """Make of ``module``, as its config describes it, one that the weights fit, in place.

        Best on torch's meta device, where it costs nothing. Raises RequestError for names that do
        not exist and counts that cannot be.
        """
        from sdvino.compress import lean_modules as lean

        for name in self.removed:
            lean.put(module, name, _gap(_find(module, name), name))
        for name, count in self.heads.items():
            attention = _find(module, name)
            heads = getattr(attention, "heads", 0) if _is(attention, "Attention") else 0
            lean.keep_heads(attention, range(_within(name, count, heads)))
        for name, count in self.channels.items():
            block = _find(module, name)
            width = block.net[2].in_features if _is(block, "FeedForward") else 0
            lean.keep_channels(block, range(_within(name, count, width)))
        for name, rank in self.ranks.items():
            layer = _find(module, name)
            most = min(layer.weight.shape[0], layer.weight[0].numel()) if _dense(layer) else 0
            lean.put(module, name, lean.low_rank_like(layer, _within(name, rank, most)))


def build(component: str, config: Mapping[str, Any], structure: Structure) -> Any:
    """Return the torch module on the meta device: names and shapes, no weights."""
    import torch

    with torch.device("meta"):
        module = _from_config(component, config)
        structure.apply(module)
    return module.eval().requires_grad_(False)


def load_component(folder: Path, component: str) -> Any:
    """Return the module in ``folder``, float32 and eval mode; nothing in the folder is run.

    ``component``: unet, vae, text_encoder or text_encoder_2. Raises RequestError for a structure
    that does not fit the config, and weights that fit neither.
    """
    structure = Structure.read(folder)
    config = read_json(folder / "config.json", f"{folder.name}/config.json")
    files = weight_files(folder)
    module = build(component, config, Structure() if structure is None else structure)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = shapes_in(files)
    if found != expected:
        if structure is None:  # older names: the library knows how to translate them
            return _from_pretrained(folder, component)
        differing = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise RequestError(
            f"The weights of {folder.name} do not fit its {STRUCTURE_FILE}"
            f" ({differing[0][:120]}); make the folder again."
        )
    if any(buffer.is_meta for buffer in module.buffers()):
        # Buffers that are in no file, such as a text encoder's positions, are made by the class.
        module = _with_buffers(component, config, module)
    fill(module, files)
    return module


def save_component(
    module: Any,
    folder: Path,
    *,
    config: Mapping[str, Any],
    structure: Structure,
    dtype: Dtype = "float16",
) -> None:
    """Write what `load_component` reads into ``folder``, one tensor in memory at a time.

    ``config`` is the component's own, of diffusers. A tensor that half precision cannot hold stays
    in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    structure.write(folder)
    write_weights(folder / WEIGHTS_FILE, module.state_dict(), dtype)


def _from_config(component: str, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    values = {key: value for key, value in config.items() if key != "_name_or_path"}
    if component == "unet":
        return diffusers.UNet2DConditionModel.from_config(values)
    if component == "vae":
        return diffusers.AutoencoderKL.from_config(values)
    cls = _text_class(component)
    return cls(transformers.CLIPTextConfig(**values))


def _text_class(component: str) -> Any:
    import transformers

    if component == "text_encoder_2":
        return transformers.CLIPTextModelWithProjection
    return transformers.CLIPTextModel


def _from_pretrained(folder: Path, component: str) -> Any:
    import diffusers
    import torch

    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    cls = classes[component] if component in classes else _text_class(component)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if any(".fp16." in file.name for file in weight_files(folder)):
        options["variant"] = "fp16"
    module, loaded = cls.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise RequestError(
            f"The {component} lacks {len(missing)} of its weights ({missing[0]}); get the model"
            " again, complete."
        )
    return module.to(torch.float32).eval().requires_grad_(False)


def _with_buffers(component: str, config: Mapping[str, Any], module: Any) -> Any:
    """Give ``module`` the buffers of one made in full; only text encoders have any."""
    short = {**config, "num_hidden_layers": 1}  # its buffers are the embeddings'
    full = dict(_from_config(component, short).named_buffers())
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, own = name.rpartition(".")
            module.get_submodule(parent)._buffers[own] = full[name]
    return module


def _gap(module: Any, name: str) -> Any:
    if _is(module, "Transformer2DModel") or (_is(module, "ResnetBlock2D") and can_pass(module)):
        return gap_for(module)
    raise _wrong(f"removes {name[:120]!r}, which cannot be left out")


def gap_for(block: Any) -> Any:
    """Return what stands where ``block``, a residual or an attention block, was."""
    from sdvino.compress.lean_modules import NoAttention, PassThrough

    return NoAttention() if _is(block, "Transformer2DModel") else PassThrough(block.out_channels)


def can_pass(resnet: Any) -> bool:
    """Tell whether what a ResnetBlock2D is fed could go on in its place, as it is."""
    plain = resnet.upsample is None and resnet.downsample is None
    return bool(plain and resnet.in_channels >= resnet.out_channels)


def _find(module: Any, name: str) -> Any:
    try:
        return module.get_submodule(name) if name else None
    except AttributeError as error:
        raise _wrong(f"names {name[:120]!r}, which this component has not") from error


def _is(module: Any, name: str) -> bool:
    return type(module).__name__ == name


def _dense(module: Any) -> bool:
    from sdvino.compress.lean_modules import can_be_low_rank

    return module is not None and can_be_low_rank(module)


def _within(name: str, count: int, most: int) -> int:
    if not 1 <= count <= most:
        raise _wrong(f"leaves {count} of {name[:120]!r}, which has {most}")
    return count


def _counts(key: str, value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > _MOST_NAMES:
        raise _wrong(f"has no table under `{key}`")
    for count in value.values():
        if type(count) is not int or not 1 <= count <= _MOST:
            raise _wrong(f"has something else than a count under `{key}`")
    return value


def _wrong(what: str) -> RequestError:
    return RequestError(f"{STRUCTURE_FILE} {what}; make the component's folder again.")
