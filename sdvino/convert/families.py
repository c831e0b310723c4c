"""Model families as data: how each is told, what it consists of and what is sensible to ask of it.

A family is told by its facts: what the pipeline's class, the UNet's and the scheduler's configs
say. Names decide only where nothing else does (a Lightning folder differs from the base model's by
its weights alone).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdvino.settings import SamplerName

AddedConditioning = Literal["none", "text_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What tells a family."""

    #: The UNet takes pooled text and sizes (SDXL's addition_embed_type text_time).
    text_time: bool = False
    #: The text encoder is OpenCLIP's (Stable Diffusion 2.x).
    open_clip: bool = False
    #: The UNet takes a mask and a masked picture beside the latents (9 channels).
    inpainting: bool = False
    #: The UNet takes an embedded guidance scale (time_cond_proj_dim), as LCM does.
    guidance_embedding: bool = False
    #: Transformer layers or a middle block are missing (distilled, smaller UNets).
    fewer_blocks: bool = False
    #: epsilon, v_prediction or sample.
    prediction_type: str = "epsilon"
    #: The scheduler is Euler's, over timesteps spaced from the last, with the usual betas.
    trailing: bool = False
    #: The UNet's own size is 512 pixels or fewer.
    small_pictures: bool = False
    #: Names of files, folders and repositories, for want of anything better.
    names: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one family share."""

    name: str
    #: In a word or two, for people.
    title: str
    #: The facts that a model of the family has; those not named may be anything.
    signs: Mapping[str, Any] = field(default_factory=dict)
    #: Words (a regular expression) that its names hold; None: names do not matter.
    words: str | None = None
    #: Class of model_index.json, when sdvino writes one.
    pipeline: str
    #: Sub-folders of the text encoders, in the order their states are joined in.
    text_encoders: tuple[str, ...]
    added_conditioning: AddedConditioning = "none"
    #: What the UNet predicts in the published model.
    prediction_type: str = "epsilon"
    #: Pixels along a side that the published model was trained on.
    native_size: int
    #: Whether `sdvino generate` makes pictures with it.
    runs: bool = True
    #: What a picture takes when the source does not say.
    num_inference_steps: int
    guidance_scale: float
    scheduler: SamplerName
    #: Few steps and little guidance are the family's point: they go before the folder's scheduler.
    distilled: bool = False

    @property
    def components(self) -> dict[str, str]:
        """Return our components and the sub-folders of the source that hold their weights."""
        text = {name: name for name in self.text_encoders}
        return {**text, "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}

    @property
    def classes(self) -> dict[str, str]:
        """Return each sub-folder and the one class that model_index.json may name for it."""
        found = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        for name in self.text_encoders:
            found[name] = _TEXT_CLASSES[name]
            found[tokenizer_of(name)] = "CLIPTokenizer"
        return found


def tokenizer_of(text_encoder: str) -> str:
    """Return the sub-folder of the tokenizer of ``text_encoder``."""
    return text_encoder.replace("text_encoder", "tokenizer")


_TEXT_CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_ONE: tuple[str, ...] = ("text_encoder",)
_TWO: tuple[str, ...] = ("text_encoder", "text_encoder_2")


def _sd(name: str, title: str, signs: Mapping[str, Any], **changes: Any) -> Family:
    """Return a family with one text encoder: Stable Diffusion 1.x's, but for ``changes``."""
    row: dict[str, Any] = {
        "pipeline": "StableDiffusionPipeline",
        "text_encoders": _ONE,
        "native_size": 512,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "scheduler": "dpmpp_2m",
        **changes,
    }
    return Family(name=name, title=title, signs=signs, **row)


def _sdxl(name: str, title: str, signs: Mapping[str, Any], **changes: Any) -> Family:
    """Return a family with two text encoders: Stable Diffusion XL's, but for ``changes``."""
    row: dict[str, Any] = {
        "pipeline": "StableDiffusionXLPipeline",
        "text_encoders": _TWO,
        "added_conditioning": "text_time",
        "native_size": 1024,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "scheduler": "dpmpp_2m",
        **changes,
    }
    return Family(name=name, title=title, signs=signs, **row)


# What distilled models are asked for, by their model cards. Guidance 1 is none.
_TURBO: Mapping[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "scheduler": "euler_ancestral",
    "native_size": 512,
    "distilled": True,
}
_SD_TURBO: Mapping[str, Any] = {**_TURBO, "scheduler": "euler"}
_LIGHTNING: Mapping[str, Any] = {**_SD_TURBO, "native_size": 1024}
# The guidance is a number that the UNet takes: it costs no second evaluation.
_LCM: Mapping[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 8.5,
    "scheduler": "lcm",
    "distilled": True,
}
_INPAINTING: Mapping[str, Any] = {"runs": False}
_LCM_PIPELINE = "LatentConsistencyModelPipeline"
_INPAINT_PIPELINE = "StableDiffusionInpaintPipeline"
_XL_INPAINT_PIPELINE = "StableDiffusionXLInpaintPipeline"
_SDXL_TURBO = r"sd[-_. ]?xl[-_. ]?turbo"

#: Every family. The first one that fits is a model's, so what is special stands before what is not.
FAMILIES: tuple[Family, ...] = (
    _sdxl(
        "sdxl-inpaint",
        "Stable Diffusion XL inpainting",
        {"inpainting": True},
        pipeline=_XL_INPAINT_PIPELINE,
        **_INPAINTING,
    ),
    _sdxl("sdxl-lcm", "LCM of Stable Diffusion XL", {"guidance_embedding": True}, **_LCM),
    _sdxl("ssd-1b", "SSD-1B", {"fewer_blocks": True}, guidance_scale=9.0),
    _sdxl("sdxl-turbo", "SDXL-Turbo", {"trailing": True, "small_pictures": True}, **_TURBO),
    _sdxl("sdxl-turbo", "SDXL-Turbo", {}, words=_SDXL_TURBO, **_TURBO),
    _sdxl("sdxl-lightning", "SDXL-Lightning", {}, words=r"lightning", **_LIGHTNING),
    _sdxl("sdxl", "Stable Diffusion XL", {}),
    _sd(
        "sd2-inpaint",
        "Stable Diffusion 2.x inpainting",
        {"open_clip": True, "inpainting": True},
        pipeline=_INPAINT_PIPELINE,
        **_INPAINTING,
    ),
    _sd("sd-turbo", "SD-Turbo", {"open_clip": True, "trailing": True}, **_SD_TURBO),
    _sd("sd-turbo", "SD-Turbo", {"open_clip": True}, words=r"sd[-_. ]?turbo", **_SD_TURBO),
    _sd(
        "sd2-v",
        "Stable Diffusion 2.x (v-prediction)",
        {"open_clip": True, "prediction_type": "v_prediction"},
        prediction_type="v_prediction",
        native_size=768,
    ),
    _sd("sd2", "Stable Diffusion 2.x", {"open_clip": True}),
    _sd(
        "sd1-inpaint",
        "Stable Diffusion 1.x inpainting",
        {"inpainting": True},
        pipeline=_INPAINT_PIPELINE,
        **_INPAINTING,
    ),
    _sd(
        "sd1-lcm",
        "LCM of Stable Diffusion 1.x",
        {"guidance_embedding": True},
        pipeline=_LCM_PIPELINE,
        **_LCM,
    ),
    _sd("sd1-small", "small Stable Diffusion 1.x", {"fewer_blocks": True}),
    _sd("sd1", "Stable Diffusion 1.x", {}),
)

#: Pipeline classes of model_index.json that `sdvino convert` takes.
PIPELINE_CLASSES: tuple[str, ...] = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    _INPAINT_PIPELINE,
    _LCM_PIPELINE,
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    _XL_INPAINT_PIPELINE,
)
#: The families in a line, for messages.
TITLES = "Stable Diffusion 1.x, 2.x and XL, their turbo, LCM, small and inpainting models"


def find_family(facts: Facts) -> Family:
    """Return the first family whose signs and words ``facts`` have."""
    return next(family for family in FAMILIES if _fits(family, facts))


def _fits(family: Family, facts: Facts) -> bool:
    if family.added_conditioning != ("text_time" if facts.text_time else "none"):
        return False
    if any(getattr(facts, sign) != value for sign, value in family.signs.items()):
        return False
    return family.words is None or re.search(family.words, facts.names, re.IGNORECASE) is not None


# A model with a middle block, whose deepest level has this many transformer layers, is whole.
_SDXL_DEPTH = 10


def read_facts(
    unet: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    names: str,
) -> Facts:
    """Return what the configs of a diffusers folder tell of its family."""
    text_time = unet.get("addition_embed_type") == "text_time"
    return Facts(
        text_time=text_time,
        open_clip=not text_time and _is_open_clip(unet, text_encoder),
        inpainting=unet.get("in_channels") == 9,
        guidance_embedding=unet.get("time_cond_proj_dim") is not None,
        fewer_blocks=_has_fewer_blocks(unet, text_time=text_time),
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        trailing=scheduler.get("timestep_spacing") == "trailing"
        and str(scheduler.get("_class_name")).startswith("Euler")
        and not scheduler.get("rescale_betas_zero_snr"),
        small_pictures=_is_small(unet.get("sample_size")),
        names=names,
    )


# Stable Diffusion 2.x brought OpenCLIP's ViT-H, 1024 wide, and linears around the attention.
_OPEN_CLIP_WIDTH = 1024
_SMALL_LATENTS = 64
_MIDDLE = "UNetMidBlock2DCrossAttn"


def _is_small(size: object) -> bool:
    return isinstance(size, int) and size <= _SMALL_LATENTS


def _is_open_clip(unet: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> bool:
    return (
        text_encoder.get("hidden_size") == _OPEN_CLIP_WIDTH
        or text_encoder.get("hidden_act") == "gelu"
        or bool(unet.get("use_linear_projection"))
    )


def _has_fewer_blocks(unet: Mapping[str, Any], *, text_time: bool) -> bool:
    if unet.get("mid_block_type", _MIDDLE) != _MIDDLE:
        return True
    if unet.get("reverse_transformer_layers_per_block") is not None:
        return True
    # SSD-1B and Vega are as wide as SDXL and not as deep; narrower ones are their own.
    widths, depths = unet.get("block_out_channels"), unet.get("transformer_layers_per_block")
    full_width = text_time and widths == [320, 640, 1280] and isinstance(depths, list)
    return full_width and isinstance(depths, list) and depths[-1] != _SDXL_DEPTH
