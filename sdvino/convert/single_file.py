"""A single .safetensors file of Stable Diffusion 1.x, 2.x or XL, unpacked into a diffusers folder.

The family is read from names and shapes in the header alone. The weights go over one tensor at a
time, in half precision, with neither torch nor diffusers in memory; the configs come with sdvino.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.convert import checkpoint_layout as layout
from sdvino.convert.checkpoint_layout import LayoutError, Shape, Tensor, under
from sdvino.convert.clip_vocabulary import END, Vocabulary
from sdvino.convert.families import Family, find_family, read_facts, tokenizer_of
from sdvino.convert.hints import Hints, read_hints
from sdvino.convert.progress import Progress, silent
from sdvino.convert.safetensors_header import FLOATS, Header, read_half, read_header, write_half
from sdvino.errors import RequestError
from sdvino.inputs.files import read_json

_CONFIGS = Path(__file__).parent / "configs"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_STAMP = "unpacked.json"
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# CLIP pads with its end, OpenCLIP with token 0.
_OPEN_CLIP_PAD = "!"
_HEAD_CHANNELS = 64
_LATENT_PIXELS = 8
_MAX_CHANNELS = 16_384
_MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checked checkpoint file, with what each component of it will be."""

    header: Header
    #: The file's name without its ending.
    name: str
    family: Family
    #: Component (a sub-folder of the diffusers folder) -> its config.
    configs: Mapping[str, Mapping[str, Any]]
    #: Component -> diffusers' names of its tensors and where each comes from.
    tensors: Mapping[str, Mapping[str, Tensor]]
    hints: Hints

    @classmethod
    def open(cls, path: Path, *, prediction_type: str | None = None) -> SingleFile:
        """Read the header of ``path`` and tell what the file is.

        prediction_type: what the UNet predicts, where the person knows: epsilon or v_prediction.
        Raises RequestError, in one sentence, for a file that is no Stable Diffusion checkpoint.
        """
        check_suffix(path)
        return cls.of(read_header(path), prediction_type=prediction_type)

    @classmethod
    def of(cls, header: Header, *, prediction_type: str | None = None) -> SingleFile:
        """Tell what the file with ``header`` is, which need not be here; otherwise as `open`."""
        path = header.path
        shapes = {name: info.shape for name, info in header.tensors.items()}
        _check_kind(path, shapes)
        hints = read_hints(header, prediction_type)
        try:
            tensors = _components(path, shapes)
            configs = _configs(shapes, tensors)
        except LayoutError as error:
            raise RequestError(
                f"{path} is not laid out as Stable Diffusion 1.x, 2.x or XL: {error};"
                " give the model as a diffusers folder."
            ) from error
        _check_floats(header, tensors)
        _check_sizes(path, tensors)
        family = _family(configs, hints)
        return cls(
            header=header,
            name=path.stem,
            family=family,
            configs=_complete(configs, family, hints),
            tensors=tensors,
            hints=hints,
        )

    @property
    def bytes_unpacked(self) -> dict[str, int]:
        """Return the bytes of each component's weights in the folder that `unpack` writes."""
        return {
            component: sum(2 * math.prod(tensor.shape) for tensor in tensors.values())
            for component, tensors in self.tensors.items()
        }

    @property
    def shapes(self) -> dict[str, dict[str, Shape]]:
        """Return the shapes of each component's weights, under diffusers' names."""
        return {
            component: {name: tensor.shape for name, tensor in tensors.items()}
            for component, tensors in self.tensors.items()
        }

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the text encoders know."""
        return int(self.configs["text_encoder"]["vocab_size"])

    def unpack(self, folder: Path, vocabulary: Vocabulary, progress: Progress = silent) -> Path:
        """Write the diffusers folder ``folder`` and return it.

        A component's weights appear when they are complete, and unpacking goes on where it was
        stopped; a folder that is complete is not touched. Raises RequestError for weights that are
        not numbers.
        """
        if _start(folder, self._stamp(vocabulary)):
            return folder
        for component, tensors in self.tensors.items():
            stem = _WEIGHTS.get(component, "model")
            target = folder / component / f"{stem}.safetensors"
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_file():
                progress(f"unpack {component}", 0.0)
                write_half(target, self.shapes[component], self._values(tensors))
        return self.outline(folder, vocabulary)

    def outline(self, folder: Path, vocabulary: Vocabulary) -> Path:
        """Write what `unpack` does, but for the weights, and return ``folder``."""
        for component, config in self.configs.items():
            if component in self.tensors:
                _write_json(folder / component / "config.json", config)
        for component in self.family.text_encoders:
            open_clip = self.configs[component]["hidden_act"] == "gelu"
            pad = _OPEN_CLIP_PAD if open_clip else END
            vocabulary.write(folder / tokenizer_of(component), pad=pad)
        _write_json(folder / "scheduler" / "scheduler_config.json", self.configs["scheduler"])
        # The index last: with it the folder is complete.
        if self.hints.steps is not None and self.family.distilled:
            suggested = {"num_inference_steps": self.hints.steps}
            _write_json(folder / "sdvino.json", {"suggested": suggested})
        index = {**_index(self.family, self.configs), "_name_or_path": self.hints.names}
        _write_json(folder / "model_index.json", index)
        return folder

    def _values(self, tensors: Mapping[str, Tensor]) -> Iterator[NDArray[np.float16]]:
        for tensor in tensors.values():
            yield _changed(read_half(self.header, tensor.source), tensor)

    def _stamp(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return what tells this file, as it is read now, from another."""
        status = self.header.path.stat()
        words = json.dumps([vocabulary.vocab, list(vocabulary.merges)])
        stamp = {
            "file": self.header.path.name,
            "size": status.st_size,
            "modified": status.st_mtime_ns,
            "vocabulary": hashlib.sha256(words.encode()).hexdigest(),
            "configs": {name: dict(value) for name, value in self.configs.items()},
        }
        result: dict[str, Any] = json.loads(json.dumps(stamp))
        return result


def check_suffix(path: Path) -> None:
    """Raise RequestError for a file whose name says that it is not safetensors."""
    if path.suffix.lower() in _PICKLES:
        raise RequestError(
            f"{path} is a pickle, which can run code when it is opened, so sdvino does not: get the"
            " .safetensors version of the model, or turn the file into one where you trust it"
            " (torch.load(..., weights_only=True), then safetensors.torch.save_file)."
        )
    if path.suffix.lower() != ".safetensors":
        raise RequestError(
            f"{path} is a file of another kind; convert takes a .safetensors checkpoint, a"
            " diffusers folder, an OpenVINO folder or a hub id (owner/name)."
        )


# Names that only one kind of file has -> what it is, and what to do.
_OTHER_KINDS = (
    (
        r"^lora_(?:unet|te)|\.lora_(?:A|B|up|down)\b|\.lora\.(?:up|down)\b",
        "a LoRA: add it with --lora",
    ),
    (r"^(?:emb_params|string_to_param|clip_[lg])", "a textual inversion, which convert leaves out"),
    (r"^(?:control_model\.|controlnet_cond_embedding|input_hint_block)", "a ControlNet"),
    (r"joint_blocks\.", "Stable Diffusion 3, which sdvino does not run"),
    (r"double_blocks\.", "Flux, which sdvino does not run"),
    (r"^edm_mean$", "Playground v2.5, whose noise sdvino does not make"),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner; give the base model"),
    (
        r"^(?:down_blocks|mid_block)\.",
        "one component in diffusers' naming; give the whole folder",
    ),
    (r"^(?:encoder|decoder)\.conv_in", "an autoencoder alone: add it with --vae"),
    (r"^input_blocks\.", "a UNet alone; give the whole checkpoint"),
    (r"^(?:text_model\.|text_projection)", "a text encoder alone; give the whole checkpoint"),
)


def _check_kind(path: Path, shapes: Mapping[str, Shape]) -> None:
    for pattern, what in _OTHER_KINDS:
        if any(re.search(pattern, name) is not None for name in shapes):
            raise RequestError(f"{path} is {what}.")
    if not under(shapes, layout.UNET):
        raise RequestError(
            f"{path} holds no UNet of Stable Diffusion (nothing in it starts with {layout.UNET});"
            " give a whole checkpoint of Stable Diffusion 1.x, 2.x or XL."
        )


def _components(path: Path, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Tensor]]:
    """Return each component's tensors, under diffusers' names."""
    result: dict[str, dict[str, Tensor]] = {}
    clip, open_clip = under(shapes, layout.CLIP), under(shapes, layout.OPEN_CLIP)
    xl, xl_2 = under(shapes, layout.SDXL_CLIP), under(shapes, layout.SDXL_OPEN_CLIP)
    if xl and xl_2:
        result["text_encoder"] = _prefixed(layout.SDXL_CLIP, layout.clip_tensors(xl))
        second = layout.open_clip_tensors(xl_2, projection=True)
        result["text_encoder_2"] = _prefixed(layout.SDXL_OPEN_CLIP, second)
    elif clip:
        result["text_encoder"] = _prefixed(layout.CLIP, layout.clip_tensors(clip))
    elif open_clip:
        tensors = layout.open_clip_tensors(open_clip, projection=False)
        result["text_encoder"] = _prefixed(layout.OPEN_CLIP, tensors)
    else:
        raise RequestError(
            f"{path} has no text encoder (a pruned file); give the full version of the model."
        )
    result["unet"] = _prefixed(layout.UNET, layout.unet_tensors(under(shapes, layout.UNET)))
    prefix = _vae_prefix(shapes)
    if prefix is None:
        raise RequestError(
            f"{path} has no autoencoder (a pruned file); give the full version of the model."
        )
    result["vae"] = _prefixed(prefix, layout.vae_tensors(under(shapes, prefix)))
    return result


def _vae_prefix(shapes: Mapping[str, Shape]) -> str | None:
    return next((prefix for prefix in layout.VAES if under(shapes, prefix)), None)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: Tensor(prefix + tensor.source, tensor.change, tensor.shape)
        for name, tensor in tensors.items()
    }


def _configs(
    shapes: Mapping[str, Shape], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Return what the shapes tell of each component's config."""
    open_clip = bool(under(shapes, layout.OPEN_CLIP)) or "text_encoder_2" in tensors
    unet = layout.unet_config(
        under(shapes, layout.UNET), head_channels=_HEAD_CHANNELS if open_clip else None
    )
    vae = layout.vae_config(under(shapes, _vae_prefix(shapes) or ""))
    text = {name: layout.text_config(t) for name, t in tensors.items() if name.startswith("text")}
    labels = shapes.get(f"{layout.UNET}label_emb.0.0.weight")
    if "text_encoder_2" in text:
        pooled = text["text_encoder_2"].get("projection_dim")
        if labels is None or pooled is None:
            raise LayoutError("it has no label_emb, or no text_projection, as SDXL has")
        unet["addition_embed_type"] = "text_time"
        unet["projection_class_embeddings_input_dim"] = labels[1]
        unet["addition_time_embed_dim"] = (labels[1] - pooled) // 6
    elif labels is not None:
        raise LayoutError("its UNet takes class labels (an upscaler, or unCLIP)")
    return {**text, "unet": unet, "vae": vae}


def _family(configs: Mapping[str, Mapping[str, Any]], hints: Hints) -> Family:
    unet = configs["unet"]
    text = configs["text_encoder"]
    open_clip = isinstance(unet["attention_head_dim"], list)
    # 2.x has both kinds; where nothing says which, diffusers takes the one that predicts v too.
    undecided = "v_prediction" if open_clip and "text_encoder_2" not in configs else "epsilon"
    prediction = hints.prediction_type if hints.prediction_type is not None else undecided
    facts = read_facts(
        {**unet, "use_linear_projection": open_clip},
        text,
        {"prediction_type": prediction},
        hints.names,
    )
    return find_family(facts)


def _complete(
    configs: Mapping[str, Mapping[str, Any]], family: Family, hints: Hints
) -> dict[str, dict[str, Any]]:
    """Return whole configs: those that come with sdvino, and what the shapes tell."""
    result = {name: {**_shipped(family, name), **config} for name, config in configs.items()}
    native = hints.native_size if hints.native_size is not None else family.native_size
    result["unet"]["sample_size"] = native // _LATENT_PIXELS
    scheduler = _shipped(family, "scheduler")
    if hints.prediction_type is not None:
        scheduler["prediction_type"] = hints.prediction_type
    if hints.zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    result["scheduler"] = scheduler
    return result


def _shipped(family: Family, name: str) -> dict[str, Any]:
    """Return the config that comes with sdvino: the family's own, or that of what it stands on."""
    if len(family.text_encoders) == 2:
        base = "sdxl"
    else:
        base = "sd2" if family.signs.get("open_clip") else "sd1"
    own, general = (_CONFIGS / folder / f"{name}.json" for folder in (family.name, base))
    path = own if own.is_file() else general
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _check_floats(header: Header, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for component, named in tensors.items():
        for tensor in named.values():
            dtype = header.tensors[tensor.source].dtype
            if dtype not in FLOATS:
                raise RequestError(
                    f"The {component} of {header.path} is stored as {dtype}, which loses too much;"
                    " give the fp16 version of the model."
                )


def _check_sizes(path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse shapes that no Stable Diffusion model has, before anything is made of them."""
    for named in tensors.values():
        for name, tensor in named.items():
            limit = _MAX_TOKENS if name.endswith("token_embedding.weight") else _MAX_CHANNELS
            if not 1 <= len(tensor.shape) <= 4 or not all(1 <= n <= limit for n in tensor.shape):
                raise RequestError(
                    f"{path} gives {tensor.source[:120]} the shape {list(tensor.shape)[:8]}, which"
                    " no Stable Diffusion model has; get the file again."
                )


def _changed(values: NDArray[np.float16], tensor: Tensor) -> NDArray[np.float16]:
    if tensor.change == "linear":
        return values.reshape(tensor.shape)
    if tensor.change == "transposed":
        flipped: NDArray[np.float16] = values.T
        return flipped
    if tensor.change in ("q", "k", "v"):
        rows = tensor.shape[0]
        first = "qkv".index(tensor.change) * rows
        return values[first : first + rows]
    return values


def _index(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": family.pipeline}
    for folder, name in family.classes.items():
        library = "transformers" if name.startswith("CLIP") else "diffusers"
        index[folder] = [library, name]
    index["scheduler"] = ["diffusers", configs["scheduler"]["_class_name"]]
    if len(family.text_encoders) == 2:
        # As the published base has it; sdxl-turbo too.
        return {**index, "force_zeros_for_empty_prompt": True}
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return {**index, **absent, "requires_safety_checker": False}


def _start(folder: Path, stamp: Mapping[str, Any]) -> bool:
    """Make ``folder``, without what came from another file; tell whether it is complete."""
    path = folder / _STAMP
    try:
        same = read_json(path, _STAMP) == stamp
    except RequestError:
        same = False
    if same:
        return (folder / "model_index.json").is_file()
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write_json(path, stamp)
    return False


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
