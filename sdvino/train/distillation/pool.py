"""What a student learns from: latents with what the UNet is told of them, kept on disk.

Latents come from a folder of pictures, through the autoencoder, or from the teacher itself, which
draws them from prompts with DDIM and its guidance. Its trajectories are kept too, at the noise
levels that a student of few steps steps between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdvino.train.distillation.models import (
    Models,
    ask_guided,
    encode_pictures,
    encode_texts,
    place,
)
from sdvino.train.distillation.noise_levels import NoiseLevels
from sdvino.train.distillation.pictures import Captioned, load_pictures
from sdvino.train.distillation.store import in_chunks

_TEXTS_IN_CHUNK = 256
_PICTURES_IN_CHUNK = 32
# Latents of the teacher's in a chunk, all denoised together.
_DRAWN_IN_CHUNK = 16
_DRAWN_IN_LARGE_CHUNK = 2
_LARGE_LATENTS = 10_000
_SEED = 0x5D1
_MOST_SEEDS = 2**63

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Texts:
    """What the UNet is told of texts, each of them once."""

    #: float16 [texts, tokens, width].
    states: Any
    #: float32 [tokens, width], of no text.
    empty: Any

    def of(self, indices: Any, device: Any) -> Any:
        """Return the states of the texts ``indices``, int64 [n], float32 on ``device``."""
        return self.states[indices].to(device).float()


@dataclass(frozen=True, slots=True)
class Pool:
    """Latents, float32 [n, C, h, w], and the text of each, int64 [n]."""

    latents: Any
    text: Any


@dataclass(frozen=True, slots=True)
class Trajectories:
    """How the teacher drew, and where it was between the steps of a student."""

    #: float32 [n, steps + 1, C, h, w], noise first.
    x: Any
    #: int64 [n].
    text: Any

    @property
    def pool(self) -> Pool:
        """Return where they end."""
        return Pool(self.x[:, -1], self.text)


def unique_texts(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return each text once, in order, and which of those each of ``texts`` is."""
    places: dict[str, int] = {}
    indices = [places.setdefault(text, len(places)) for text in texts]
    return list(places), indices


def make_texts(
    models: Models, texts: Sequence[str], folder: Path, device: Any, progress: Progress
) -> Texts:
    """Encode ``texts`` and no text, in chunks kept in ``folder``."""
    everything = ["", *texts]

    def make(part: range) -> dict[str, Any]:
        states = encode_texts(models, [everything[i] for i in part], device)
        return {"states": states.half()}  # as exact as the weights that made them, mostly

    states = in_chunks(folder, len(everything), _TEXTS_IN_CHUNK, make, progress)["states"]
    return Texts(states[1:], states[0].float())


def make_pool(
    models: Models,
    entries: Sequence[Captioned],
    indices: Sequence[int],
    folder: Path,
    device: Any,
    progress: Progress,
) -> Pool:
    """Encode pictures to latents, in chunks kept in ``folder``; their texts are ``indices``."""
    import torch

    _, height, width = models.latent_shape
    factor = 2 ** (len(models.vae.config.block_out_channels) - 1)
    vae = place(models.vae, device)

    def make(part: range) -> dict[str, Any]:
        pictures = load_pictures([entries[i] for i in part], (factor * height, factor * width))
        return {"latents": encode_pictures(vae, pictures, device)}

    found = in_chunks(folder, len(entries), _PICTURES_IN_CHUNK, make, progress)
    return Pool(found["latents"], torch.tensor(indices))


def draw_trajectories(
    teacher: Any,
    levels: NoiseLevels,
    texts: Texts,
    folder: Path,
    *,
    shape: tuple[int, int, int],
    count: int,
    steps: int,
    kept: int,
    guidance_scale: float,
    seed: int,
    device: Any,
    progress: Progress,
) -> Trajectories:
    """Let ``teacher`` draw ``count`` latents in ``steps`` of DDIM, in chunks kept in ``folder``.

    The texts go round. Of each way ``kept`` + 1 states are kept, evenly, both ends among them.
    """
    import torch

    grid, stride = levels.grid(steps), steps // kept
    empty = texts.empty.to(device)

    def make(part: range) -> dict[str, Any]:
        text = torch.tensor([i % len(texts.states) for i in part])
        states = texts.of(text, device)
        noise = torch.Generator().manual_seed((_SEED + seed * 1_000_003 + part.start) % _MOST_SEEDS)
        x = torch.randn(len(part), *shape, generator=noise).to(device)
        found = [x]
        for step, (t, to) in enumerate(pairwise(grid), 1):
            at = torch.full((len(part),), t, device=device)
            output = ask_guided(teacher, x, at, states, empty, guidance_scale)
            x = levels.jump(output, x, at, torch.full_like(at, to))
            if step % stride == 0:
                found.append(x)
        return {"x": torch.stack([one.cpu() for one in found], 1), "text": text}

    large = shape[1] * shape[2] * shape[0] > _LARGE_LATENTS
    size = _DRAWN_IN_LARGE_CHUNK if large else _DRAWN_IN_CHUNK
    found = in_chunks(folder, count, size, make, progress)
    return Trajectories(found["x"], found["text"])
