"""The pipelines that run here, as data: what each reads its text with and tells its UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineKind:
    """What models of one pipeline class of diffusers share."""

    #: For messages.
    title: str
    #: Text encoders; their states stand side by side, in this order.
    text_encoders: tuple[str, ...]
    #: Layers left out at the end of every text encoder, before any clip_skip.
    skipped_layers: int
    #: Whether the states go through the text encoder's final layer norm.
    final_norm: bool
    #: Whether the UNet takes the last text encoder's pooled state (``text_embeds``) and the sizes
    #: of the picture (``time_ids``).
    added_conditions: bool
    #: What a picture takes when nobody says.
    num_inference_steps: int
    guidance_scale: float

    @property
    def pooled_encoder(self) -> str | None:
        """The text encoder whose pooled state the UNet takes, if it takes one."""
        return self.text_encoders[-1] if self.added_conditions else None


_SD = PipelineKind(
    title="Stable Diffusion 1.x and 2.x",
    text_encoders=("text_encoder",),
    skipped_layers=0,
    final_norm=True,
    added_conditions=False,
    num_inference_steps=20,
    guidance_scale=7.5,
)
# Source: arXiv:2307.01952, section 2.1 and 2.2; diffusers' StableDiffusionXLPipeline.
_SDXL = PipelineKind(
    title="Stable Diffusion XL",
    text_encoders=("text_encoder", "text_encoder_2"),
    skipped_layers=1,
    final_norm=False,
    added_conditions=True,
    num_inference_steps=20,
    guidance_scale=5.0,
)
# Source: diffusers' LatentConsistencyModelPipeline.
_LCM = replace(_SD, num_inference_steps=4, guidance_scale=8.5)

#: The pipeline class in model_index.json, without optimum-intel's OV before it -> its kind.
PIPELINE_KINDS: Mapping[str, PipelineKind] = MappingProxyType(
    {
        "StableDiffusionPipeline": _SD,
        "StableDiffusionImg2ImgPipeline": _SD,
        "StableDiffusionInpaintPipeline": _SD,
        "LatentConsistencyModelPipeline": _LCM,
        "LatentConsistencyModelImg2ImgPipeline": _LCM,
        "StableDiffusionXLPipeline": _SDXL,
        "StableDiffusionXLInpaintPipeline": _SDXL,
    }
)
#: What to use instead, in messages.
FAMILIES = "Stable Diffusion 1.x, 2.x or XL (base)"
#: The numbers of ``time_ids``: original height and width, top and left of the crop, target height
#: and width.
TIME_IDS = 6
#: Input channels of UNets that take more than the latents -> what they are for.
SPECIAL_UNETS: Mapping[int, str] = MappingProxyType(
    {9: "inpainting", 8: "picture editing (InstructPix2Pix)", 5: "depth-to-image"}
)
