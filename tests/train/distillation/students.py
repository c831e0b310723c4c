"""A teacher and students in miniature, with the demo model's text encoder beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from sdvino.train.distillation.engine import Distilled, Material, distill_unet
from sdvino.train.distillation.models import Models
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.modules import load_component
from tests.compress import tiny_unet
from tests.conftest import SHAPES_SOURCE

PROMPTS = ("a red circle", "a blue ring above a green star", "a small pink heart")
TEXT_WIDTH = 128
CONFIG: dict[str, Any] = {
    **tiny_unet.CONFIG,
    "sample_size": 4,
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": TEXT_WIDTH,
}
SCHEDULER: dict[str, Any] = json.loads(
    (SHAPES_SOURCE / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
)


def teacher(seed: int = 0) -> Any:
    """A UNet of one level for 4 x 4 latents and the demo model's texts, which it heeds."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(CONFIG)
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                parameter.data.mul_(3.0)
    return unet.eval().requires_grad_(False)


def shaken(unet: Any, by: float = 0.3) -> Any:
    """A copy of ``unet`` whose weights have moved: what pruning leaves, for a student."""
    import torch

    moved = copy.deepcopy(unet)
    noise = torch.Generator().manual_seed(1)
    for parameter in moved.parameters():
        if parameter.ndim > 1:
            scale = by * parameter.std()
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return moved


def models(student: Any = None, *, vae: bool = False) -> Models:
    """The teacher and ``student``, or a copy of the teacher."""
    unet = teacher()
    return Models(
        teacher=unet,
        student=copy.deepcopy(unet) if student is None else student,
        text_encoder=load_component(SHAPES_SOURCE / "text_encoder", "text_encoder"),
        tokenizer=SHAPES_SOURCE / "tokenizer",
        scheduler=SCHEDULER,
        vae=load_component(SHAPES_SOURCE / "vae", "vae") if vae else None,
    )


def learn(
    work: Path,
    taught: Models | None = None,
    progress: Any = None,
    student_origin: tuple[str, ...] = (),
    **how: Any,
) -> Distilled:
    """Distil with small numbers, but for those given."""
    settings: dict[str, Any] = {
        "iterations": 20,
        "batch": 4,
        "drawn": 8,
        "teacher_steps": 4,
        "student_steps": 2,
        "learning_rate": 1e-3,
        "warmup": 2,
        "ema": 0.9,
        "guidance_scale": 3.0,
        "device": "cpu",
        **how,
    }
    return distill_unet(
        models() if taught is None else taught,
        Material(prompts=PROMPTS),
        DistillSettings(**settings),
        work,
        student_origin=student_origin,
        progress=(lambda stage, share: None) if progress is None else progress,
    )
