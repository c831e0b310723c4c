"""The architectures that make_synthetic.py fills with random weights, as data.

Real ones are the published configs, where they differ from the defaults of diffusers' and
transformers' classes. Tiny ones keep what tells a family apart (its blocks, its conditioning, its
tokenizers' padding, its scheduler) and narrow everything else: one or two million parameters beside
the token embeddings, which need CLIP's whole vocabulary. Pictures are 128 x 128.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 49_408
EOS = "<|endoftext|>"

Config = dict[str, Any]

# openai/clip-vit-large-patch14 (SD 1.x, the first of SDXL).
CLIP_L: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
# stabilityai/stable-diffusion-xl-base-1.0's text_encoder_2.
CLIP_BIGG: Config = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
# stabilityai/stable-diffusion-2-1: ViT-H without its last layer.
CLIP_H: Config = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
    "pad_token_id": 1,
}
KL: Config = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
KL_SDXL: Config = {**KL, "sample_size": 1024, "scaling_factor": 0.13025}
UNET_SD15: Config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_SD2: Config = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
UNET_SDXL: Config = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# What the tiny ones have in place of the real widths.
TINY_TEXT: Config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TINY_TEXT_2: Config = {**TINY_TEXT, "hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 40}
TINY_KL: Config = {
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 128,
}
TINY_UNET_SD15: Config = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "block_out_channels": [32, 32, 64, 64],
}
TINY_UNET_SD2: Config = {**UNET_SD2, **TINY_UNET_SD15, "attention_head_dim": [2, 2, 4, 4]}
# As in segmind/tiny-sd: a level fewer, and no middle block.
TINY_UNET_SMALL: Config = {
    **TINY_UNET_SD15,
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": None,
}
TINY_UNET_SDXL: Config = {
    **UNET_SDXL,
    "sample_size": 16,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 2, 4],
    # Both text encoders' widths together.
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 8,
    # The pooled state and six embedded numbers of sizes.
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
# As in segmind/SSD-1B: fewer transformer layers, uneven on the way up, none in the middle.
TINY_UNET_SSD1B: Config = {
    **TINY_UNET_SDXL,
    "transformer_layers_per_block": [1, 1, 1],
    "reverse_transformer_layers_per_block": [[2, 1], [1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}

SCHEDULER_SD15: Config = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULER_SD2_V: Config = {
    **SCHEDULER_SD15,
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
SCHEDULER_SDXL: Config = {
    **SCHEDULER_SD15,
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
}
# stabilityai/sdxl-turbo; sd-turbo has EulerDiscreteScheduler with the same grid.
SCHEDULER_SDXL_TURBO: Config = {
    **SCHEDULER_SD15,
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
}
SCHEDULER_SD_TURBO: Config = {**SCHEDULER_SDXL_TURBO, "_class_name": "EulerDiscreteScheduler"}
SCHEDULER_LCM: Config = {
    "_class_name": "LCMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
}

#: Without a safety checker, as pipelines of one text encoder say it in model_index.json.
UNCHECKED: Config = {"safety_checker": [None, None], "feature_extractor": [None, None]}


def _one_encoder(
    text: Config,
    unet: Config,
    vae: Config,
    scheduler: Config,
    *,
    pipeline: str = "StableDiffusionPipeline",
    pad: str = EOS,
) -> Config:
    """Return a plan with one text encoder (Stable Diffusion 1.x and 2.x)."""
    return {
        "pipeline": pipeline,
        "scheduler": scheduler,
        "components": {
            "text_encoder": ("transformers", "CLIPTextModel", text),
            "unet": ("diffusers", "UNet2DConditionModel", unet),
            "vae": ("diffusers", "AutoencoderKL", vae),
        },
        "tokenizers": {"tokenizer": pad},
        "index": UNCHECKED,
    }


def _two_encoders(
    text: Config, text_2: Config, unet: Config, vae: Config, scheduler: Config
) -> Config:
    """Return a plan with two text encoders (Stable Diffusion XL)."""
    return {
        "pipeline": "StableDiffusionXLPipeline",
        "scheduler": scheduler,
        "components": {
            "text_encoder": ("transformers", "CLIPTextModel", text),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", text_2),
            "unet": ("diffusers", "UNet2DConditionModel", unet),
            "vae": ("diffusers", "AutoencoderKL", vae),
        },
        "tokenizers": {"tokenizer": EOS, "tokenizer_2": "!"},
        "index": {"force_zeros_for_empty_prompt": True},
    }


_TINY_L, _TINY_H = {**CLIP_L, **TINY_TEXT}, {**CLIP_H, **TINY_TEXT}
_TINY_BIGG = {**CLIP_BIGG, **TINY_TEXT_2}
_TINY_KL, _TINY_KL_SDXL = {**KL, **TINY_KL}, {**KL_SDXL, **TINY_KL}

ARCHITECTURES: dict[str, Config] = {
    "sd15": _one_encoder(CLIP_L, UNET_SD15, KL, SCHEDULER_SD15),
    "sd2": _one_encoder(CLIP_H, UNET_SD2, KL, SCHEDULER_SD15, pad="!"),
    "sd2-v": _one_encoder(CLIP_H, {**UNET_SD2, "sample_size": 96}, KL, SCHEDULER_SD2_V, pad="!"),
    "lcm": _one_encoder(
        CLIP_L,
        {**UNET_SD15, "time_cond_proj_dim": 256},
        KL,
        SCHEDULER_LCM,
        pipeline="LatentConsistencyModelPipeline",
    ),
    "sdxl": _two_encoders(CLIP_L, CLIP_BIGG, UNET_SDXL, KL_SDXL, SCHEDULER_SDXL),
    "tiny-sd15": _one_encoder(_TINY_L, TINY_UNET_SD15, _TINY_KL, SCHEDULER_SD15),
    "tiny-small-sd": _one_encoder(_TINY_L, TINY_UNET_SMALL, _TINY_KL, SCHEDULER_SD15),
    "tiny-sd2": _one_encoder(_TINY_H, TINY_UNET_SD2, _TINY_KL, SCHEDULER_SD15, pad="!"),
    "tiny-sd2-v": _one_encoder(_TINY_H, TINY_UNET_SD2, _TINY_KL, SCHEDULER_SD2_V, pad="!"),
    "tiny-sd-turbo": _one_encoder(_TINY_H, TINY_UNET_SD2, _TINY_KL, SCHEDULER_SD_TURBO, pad="!"),
    "tiny-lcm": _one_encoder(
        _TINY_L,
        {**TINY_UNET_SD15, "time_cond_proj_dim": 16},
        _TINY_KL,
        SCHEDULER_LCM,
        pipeline="LatentConsistencyModelPipeline",
    ),
    "tiny-inpaint": _one_encoder(
        _TINY_L,
        {**TINY_UNET_SD15, "in_channels": 9},
        _TINY_KL,
        SCHEDULER_SD15,
        pipeline="StableDiffusionInpaintPipeline",
    ),
    "tiny-sdxl": _two_encoders(_TINY_L, _TINY_BIGG, TINY_UNET_SDXL, _TINY_KL_SDXL, SCHEDULER_SDXL),
    "tiny-sdxl-turbo": _two_encoders(
        _TINY_L, _TINY_BIGG, TINY_UNET_SDXL, _TINY_KL_SDXL, SCHEDULER_SDXL_TURBO
    ),
    "tiny-ssd1b": _two_encoders(
        _TINY_L, _TINY_BIGG, TINY_UNET_SSD1B, _TINY_KL_SDXL, SCHEDULER_SDXL
    ),
}
