"""A single .safetensors file of Stable Diffusion 1.x, 2.x or XL, told by names and shapes alone.

Its weights stay where they are, under diffusers' names; the configs come with sdvino.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.convert.families import Family, find_family, read_facts, tokenizer_of
from sdvino.errors import RequestError
from sdvino.inputs.files import read_bytes, read_json, write_json
from sdvino.text.clip_vocabulary import END, Vocabulary
from sdvino.weights.architecture import text_config, unet_config
from sdvino.weights.autoencoder import read_kl
from sdvino.weights.layouts import original
from sdvino.weights.layouts.rename import LayoutError, under
from sdvino.weights.numbers import check_floats
from sdvino.weights.safetensors import PICKLES, TensorFile, Tensors

_CONFIGS = Path(__file__).parent / "configs"
_STAMP = "outline.json"
# CLIP pads with its end, OpenCLIP with token 0.
_OPEN_CLIP_PAD = "!"
_HEAD_CHANNELS = 64
_LATENT_PIXELS = 8
# Of the autoencoders of all families.
_VAE_WIDTHS = [128, 256, 512, 512]
_MAX_CHANNELS = 16_384
_MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checked checkpoint file, with what each component of it is."""

    file: TensorFile
    #: The file's name without its ending.
    name: str
    family: Family
    #: Component (a sub-folder of the diffusers folder) -> its config.
    configs: Mapping[str, Mapping[str, Any]]
    #: Component -> its tensors, in diffusers' naming; without vae where it is to be another's.
    components: Mapping[str, Tensors]
    hints: Hints

    @classmethod
    def open(
        cls, path: Path, *, prediction_type: str | None = None, own_vae: bool = True
    ) -> SingleFile:
        """Read the header of ``path`` and tell what the file is.

        prediction_type: what the UNet predicts, where the person knows: epsilon or v_prediction.
        own_vae: the file must hold an autoencoder; False where another takes its place.
        Raises RequestError, in one sentence, for a file that is no Stable Diffusion checkpoint.
        """
        check_suffix(path)
        file = TensorFile.open(path)
        return cls.of(file, prediction_type=prediction_type, own_vae=own_vae)

    @classmethod
    def of(
        cls, file: TensorFile, *, prediction_type: str | None = None, own_vae: bool = True
    ) -> SingleFile:
        """Tell what ``file`` is, which need not be here; otherwise as `open`."""
        path = file.path
        _check_kind(path, file.tensors)
        hints = read_hints(file, prediction_type)
        try:
            components = original.split(file.tensors)
            _check_whole(path, components, own_vae)
            _check_floats(path, components)
            configs = _configs(file, components)
        except LayoutError as error:
            raise RequestError(
                f"{path} is not laid out as Stable Diffusion 1.x, 2.x or XL: {error};"
                " give the model as a diffusers folder."
            ) from error
        family = _family(configs, hints)
        return cls(
            file=file,
            name=path.stem,
            family=family,
            configs=_complete(configs, family, hints),
            components=components,
            hints=hints,
        )

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the text encoders know."""
        return int(self.configs["text_encoder"]["vocab_size"])

    def outline(self, folder: Path, vocabulary: Vocabulary) -> Path:
        """Write a diffusers folder without weights to ``folder`` and return it.

        One that was written from the same file before is not touched.
        """
        if _start(folder, self._stamp(vocabulary)):
            return folder
        for component in {*self.components, "vae"}:
            write_json(folder / component / "config.json", self.configs[component])
        for component in self.family.text_encoders:
            open_clip = self.configs[component]["hidden_act"] == "gelu"
            pad = _OPEN_CLIP_PAD if open_clip else END
            vocabulary.write(folder / tokenizer_of(component), pad=pad)
        write_json(folder / "scheduler" / "scheduler_config.json", self.configs["scheduler"])
        if self.hints.steps is not None and self.family.distilled:
            suggested = {"num_inference_steps": self.hints.steps}
            write_json(folder / "sdvino.json", {"suggested": suggested})
        # The index last: with it the folder is complete.
        index = {**_index(self.family, self.configs), "_name_or_path": self.hints.names}
        write_json(folder / "model_index.json", index)
        return folder

    def _stamp(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return what tells this file, as it is read now, from another."""
        words = json.dumps([vocabulary.vocab, list(vocabulary.merges)])
        stamp = {
            "file": self.file.path.name,
            "names": self.hints.names,
            "vocabulary": hashlib.sha256(words.encode()).hexdigest(),
            "configs": {name: dict(value) for name, value in self.configs.items()},
        }
        result: dict[str, Any] = json.loads(json.dumps(stamp))
        return result


def check_suffix(path: Path) -> None:
    """Raise RequestError for a file whose name says that it is not safetensors."""
    if path.suffix.lower() in PICKLES:
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


def _check_kind(path: Path, tensors: Tensors) -> None:
    for pattern, what in _OTHER_KINDS:
        if any(re.search(pattern, name) is not None for name in tensors):
            raise RequestError(f"{path} is {what}.")


def _check_whole(path: Path, components: Mapping[str, Tensors], own_vae: bool) -> None:
    """Raise RequestError for components that are missing, or sizes that no such model has."""
    if "unet" not in components:
        raise RequestError(
            f"{path} holds no UNet of Stable Diffusion (nothing in it starts with"
            f" {original.UNET}); give a whole checkpoint of Stable Diffusion 1.x, 2.x or XL."
        )
    if "text_encoder" not in components:
        raise RequestError(
            f"{path} has no text encoder (a pruned file); give the full version of the model."
        )
    if "vae" not in components and own_vae:
        raise RequestError(
            f"{path} has no autoencoder (a pruned file); add one with --vae FILE, or give the full"
            " version of the model."
        )
    for component, tensors in components.items():
        for name, tensor in tensors.items():
            limit = _MAX_TOKENS if name.endswith("token_embedding.weight") else _MAX_CHANNELS
            if not 1 <= len(tensor.shape) <= 4 or not all(1 <= n <= limit for n in tensor.shape):
                raise RequestError(
                    f"{path} gives {name[:120]} of its {component} the shape"
                    f" {list(tensor.shape)[:8]}, which no Stable Diffusion model has;"
                    " get the file again."
                )


def _check_floats(path: Path, components: Mapping[str, Tensors]) -> None:
    for component, tensors in components.items():
        check_floats(tensors, f"The {component} of {path}")


def _configs(file: TensorFile, components: Mapping[str, Tensors]) -> dict[str, dict[str, Any]]:
    """Return what the tensors tell of each component's config."""
    text = {n: text_config(tensors) for n, tensors in components.items() if n.startswith("text")}
    open_clip = "text_encoder_2" in text or bool(under(file.tensors, original.OPEN_CLIP))
    unet = unet_config(components["unet"], head_channels=_HEAD_CHANNELS if open_clip else None)
    if "vae" in components:
        vae = read_kl(components["vae"], f"The autoencoder of {file.path}")
    else:
        vae = {"latent_channels": unet["out_channels"], "block_out_channels": _VAE_WIDTHS}
    labels = components["unet"].get("add_embedding.linear_1.weight")
    if "text_encoder_2" in text:
        pooled = text["text_encoder_2"].get("projection_dim")
        if labels is None or len(labels.shape) != 2 or pooled is None:
            raise LayoutError("it has no label_emb, or no text_projection, as SDXL has")
        unet["addition_embed_type"] = "text_time"
        unet["projection_class_embeddings_input_dim"] = labels.shape[1]
        unet["addition_time_embed_dim"] = (labels.shape[1] - pooled) // 6
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
    write_json(path, stamp)
    return False


_MAX_YAML_BYTES = 2**20
_SIZES = range(256, 2049)


@dataclass(frozen=True, slots=True)
class Hints:
    """What the surroundings of a checkpoint say; None where they say nothing."""

    #: epsilon or v_prediction.
    prediction_type: str | None
    #: Pixels along a side that it was trained on.
    native_size: int | None
    #: Steps that a distilled model was made for.
    steps: int | None
    #: Trained with a noise schedule that ends in noise alone.
    zero_snr: bool
    #: File name and titles, for `Facts.names`.
    names: str


def read_hints(header: TensorFile, prediction_type: str | None = None) -> Hints:
    """Collect the hints of a checkpoint; ``prediction_type`` is the person's word."""
    told = header.metadata
    keys = ("modelspec.title", "modelspec.architecture", "ss_base_model_version")
    names = " ".join([header.path.stem, *(told.get(key, "")[:200] for key in keys)])
    return Hints(
        prediction_type=_prediction_type(header, names)
        if prediction_type is None
        else prediction_type,
        native_size=_size(told.get("modelspec.resolution", "")),
        steps=_steps(names),
        zero_snr="ztsnr" in header.tensors,
        names=names,
    )


def _prediction_type(header: TensorFile, names: str) -> str | None:
    told = header.metadata.get("modelspec.prediction_type", "")
    if told in ("v", "v_prediction") or "v_pred" in header.tensors:
        return "v_prediction"
    if told in ("epsilon", "eps"):
        return "epsilon"
    beside = _parameterization(header.path.with_suffix(".yaml"))
    if beside is not None:
        return beside
    if re.search(r"v[-_. ]?pred|768[-_. ]?v\b|v2-?[01]?_768", names, re.IGNORECASE):
        return "v_prediction"
    if re.search(r"512[-_. ]?base|v2[-_.]?512|turbo|inpaint|eps[-_. ]?pred", names, re.IGNORECASE):
        return "epsilon"
    return None


def _parameterization(path: Path) -> str | None:
    """Return what the model's own .yaml says, if there is one; it is searched, not parsed."""
    try:
        text = read_bytes(path, limit=_MAX_YAML_BYTES).decode("utf-8", "replace")
    except RequestError:
        return None
    match = re.search(r"^[ \t]*parameterization:[ \t]*[\"']?(v|eps)\b", text, re.MULTILINE)
    if match is None:
        return "epsilon" if re.search(r"^[ \t]*unet_config:", text, re.MULTILINE) else None
    return "v_prediction" if match[1] == "v" else "epsilon"


def _size(text: str) -> int | None:
    match = re.fullmatch(r"\s*(\d{3,4})(?:x\d{3,4})?\s*", text)
    size = 0 if match is None else int(match[1])
    return size if size in _SIZES and size % 8 == 0 else None


def _steps(names: str) -> int | None:
    match = re.search(r"(?<!\d)([1-9]\d?)[-_ ]?steps?", names, re.IGNORECASE)
    return None if match is None else int(match[1])
