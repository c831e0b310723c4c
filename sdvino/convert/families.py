"""Model families as data: what a pipeline consists of and what is sensible to ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sdvino.settings import SamplerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one family share."""

    name: str
    #: Our component -> the sub-folder of the source that holds its weights.
    components: Mapping[str, str]
    #: Source sub-folder -> the one class it may name in model_index.json.
    classes: Mapping[str, str]
    #: Channels of the UNet's latents.
    latent_channels: int
    #: What a picture takes when the source does not say.
    num_inference_steps: int
    guidance_scale: float
    scheduler: SamplerName


_SD_COMPONENTS = MappingProxyType(
    {
        "text_encoder": "text_encoder",
        "unet": "unet",
        "vae_decoder": "vae",
        "vae_encoder": "vae",
    }
)
_SD_CLASSES = MappingProxyType(
    {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
)

_SD1 = Family(
    name="sd1",
    components=_SD_COMPONENTS,
    classes=_SD_CLASSES,
    latent_channels=4,
    num_inference_steps=20,
    guidance_scale=7.5,
    scheduler="dpmpp_2m",
)
_SD2 = Family(
    name="sd2",
    components=_SD_COMPONENTS,
    classes=_SD_CLASSES,
    latent_channels=4,
    num_inference_steps=20,
    guidance_scale=7.5,
    scheduler="dpmpp_2m",
)

#: Pipeline classes of model_index.json that `sdvino convert` takes.
PIPELINE_CLASSES: tuple[str, ...] = ("StableDiffusionPipeline",)

# Stable Diffusion 2.x brought OpenCLIP's ViT-H text encoder; everything else in the layout stayed.
_SD2_TEXT_WIDTH = 1024


def find_family(cross_attention_dim: int) -> Family:
    """Return the family of a Stable Diffusion UNet by the width of the text it attends to."""
    return _SD2 if cross_attention_dim == _SD2_TEXT_WIDTH else _SD1
