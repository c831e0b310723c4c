"""The networks that take part in a distillation, and how they are asked."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import RequestError
from sdvino.text.tokenizer import ClipTokenizer

# UNets with more weights than this recompute their activations.
_LARGE_UNET = 200_000_000
# Texts encoded at a time.
_TEXTS = 16
# diffusers' default of AutoencoderKL, for configs from before the field existed.
_SCALING_FACTOR = 0.18215


@dataclass(slots=True)
class Models:
    """A teacher and its student, torch modules in float32, and what they need around them."""

    teacher: Any
    #: As the teacher, or smaller: see `check_fits`.
    student: Any
    text_encoder: Any
    #: Folder of the tokenizer.
    tokenizer: Path
    #: The scheduler_config.json of the teacher.
    scheduler: Mapping[str, Any]
    #: Encodes pictures; needed for pictures alone.
    vae: Any = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents at the teacher's own size."""
        config = self.teacher.config
        side = config.sample_size
        height, width = side if isinstance(side, Sequence) else (side, side)
        return int(config.in_channels), int(height), int(width)


def choose_device(name: str) -> Any:
    """Return torch's device for auto, cpu or cuda; raises RequestError where there is none."""
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise RequestError("There is no CUDA device here; leave --device out, or give cpu.")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def place(module: Any, device: Any) -> Any:
    """Move ``module`` to ``device``, its convolutions laid out as they run fastest."""
    import torch

    return module.to(device=device, memory_format=torch.channels_last)


def is_large(unet: Any) -> bool:
    """Tell whether activations of ``unet`` are recomputed unless it is said otherwise."""
    return bool(sum(one.numel() for one in unet.parameters()) > _LARGE_UNET)


def mixed_precision(device: Any) -> AbstractContextManager[Any]:
    """Return the context that networks run in: bfloat16 products on CUDA, float32 on the CPU."""
    import torch

    if device.type == "cuda":
        context: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16)
        return context
    return contextlib.nullcontext()


def ask(unet: Any, x: Any, t: Any, states: Any) -> Any:
    """Return the output of ``unet``, float32 [n, C, h, w]: raw, as it predicts."""
    import torch

    x = x.contiguous(memory_format=torch.channels_last)
    with mixed_precision(x.device):
        output = unet(x, t, encoder_hidden_states=states, return_dict=False)[0]
    return output.float()


def ask_guided(unet: Any, x: Any, t: Any, states: Any, empty: Any, scale: float) -> Any:
    """Return u + scale (c - u), the guided output (Ho & Salimans 2022), without gradients.

    ``states``: of the prompts, [n, tokens, width]; ``empty``: of no prompt, [tokens, width].
    """
    import torch

    with torch.no_grad():
        if scale == 1.0:
            return ask(unet, x, t, states)
        both = torch.cat([empty.expand_as(states), states])
        output = ask(unet, torch.cat([x, x]), torch.cat([t, t]), both)
        without, conditional = output.chunk(2)
        return without + scale * (conditional - without)


def encode_texts(models: Models, texts: Sequence[str], device: Any) -> Any:
    """Return what the UNet is told of ``texts``: float32 [n, tokens, width], on the CPU."""
    import torch

    length = int(models.text_encoder.config.max_position_embeddings)
    tokenizer = ClipTokenizer.from_folder(models.tokenizer, length)
    encoder = models.text_encoder.to(device)
    found = []
    for start in range(0, len(texts), _TEXTS):
        ids = [torch.from_numpy(tokenizer.encode(t).ids) for t in texts[start : start + _TEXTS]]
        with torch.no_grad():
            states = encoder(input_ids=torch.cat(ids).to(device)).last_hidden_state
        found.append(states.float().cpu())
    return torch.cat(found)


def encode_pictures(vae: Any, pictures: Any, device: Any) -> Any:
    """Return scaled latents, float32 [n, C, h, w] on the CPU, of ``pictures`` NCHW in [-1, 1]."""
    import torch

    with torch.no_grad():
        mean = vae.encode(pictures.to(device)).latent_dist.mean
    scaling = float(getattr(vae.config, "scaling_factor", _SCALING_FACTOR))
    return mean.float().cpu().contiguous() * scaling


def check_fits(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Raise RequestError unless a student of this config.json can learn from the teacher's."""
    for key, what in (
        ("in_channels", "takes {} channels of latents"),
        ("out_channels", "gives {} channels"),
        ("cross_attention_dim", "attends to text {} wide"),
        ("addition_embed_type", "is told {} beside the text"),
        ("time_cond_proj_dim", "is told its guidance {} wide"),
    ):
        theirs, own = teacher.get(key), student.get(key)
        if theirs != own:
            raise RequestError(
                f"The student {what.format(own)} and its teacher {what.format(theirs)}; give a"
                " student made from this teacher."
            )
