"""What a student is asked for: each objective returns the loss of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdvino.train.distillation.models import ask, ask_guided
from sdvino.train.distillation.noise_levels import NoiseLevels, draw_timesteps
from sdvino.train.distillation.pool import Pool, Texts, Trajectories

#: recover: share of the batch that is told nothing, so that guidance goes on working.
EMPTY_SHARE = 0.1
# Pseudo-Huber's constant, of latents of unit variance (Song & Dhariwal 2023, section 3.3).
_HUBER = 0.03


@dataclass(slots=True)
class Batch:
    """The random numbers of one iteration: the same for the same seed and iteration."""

    rng: np.random.Generator
    #: torch.Generator on the CPU.
    noise: Any
    size: int
    device: Any

    def choose(self, count: int) -> Any:
        """Return indices below ``count``, int64 [size], on the CPU."""
        import torch

        return torch.from_numpy(self.rng.integers(count, size=self.size))

    def normal(self, shape: Any) -> Any:
        """Return normal noise on the device."""
        import torch

        return torch.randn(shape, generator=self.noise).to(self.device)


@dataclass(slots=True)
class Objective(ABC):
    """The loss of a student, and what it is made from."""

    teacher: Any
    levels: NoiseLevels
    texts: Texts
    #: Parts of the last loss, for the curves: scalar tensors.
    parts: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def loss(self, student: Any, average: Any, batch: Batch) -> Any:
        """Return the loss of ``student``; ``average`` is the running average of it."""

    def _told(self, text: Any, batch: Batch, empty_share: float) -> Any:
        import torch

        states = self.texts.of(text, batch.device)
        dropped = torch.from_numpy(batch.rng.random(batch.size) < empty_share).to(batch.device)
        return torch.where(dropped[:, None, None], self.texts.empty.to(batch.device), states)

    def _noised(self, pool: Pool, batch: Batch, weights: Any) -> tuple[Any, Any, Any]:
        """Return noisy latents of the pool, their timesteps, and their texts."""
        import torch

        chosen = batch.choose(len(pool.latents))
        x0 = pool.latents[chosen].to(batch.device)
        t = torch.from_numpy(draw_timesteps(weights, batch.size, batch.rng)).to(batch.device)
        return self.levels.noised(x0, batch.normal(x0.shape), t), t, pool.text[chosen]


@dataclass(slots=True)
class Recover(Objective):
    """The teacher's outputs, and what its blocks give (BK-SDM, Kim et al. 2023)."""

    pool: Pool = field(kw_only=True)
    feature_weight: float = field(kw_only=True)
    features: Features = field(kw_only=True)

    def loss(self, student: Any, average: Any, batch: Batch) -> Any:
        """Return mean squared errors of the output and of the blocks."""
        import torch

        x, t, text = self._noised(self.pool, batch, self.levels.weights())
        states = self._told(text, batch, EMPTY_SHARE)
        with torch.no_grad():
            wanted = ask(self.teacher, x, t, states)
        output = ask(student, x, t, states)
        loss = torch.nn.functional.mse_loss(output, wanted)
        self.parts = {"output": loss.detach()}
        if self.feature_weight > 0:
            blocks = feature_loss(self.features)
            self.parts["blocks"] = blocks.detach()
            loss = loss + self.feature_weight * blocks
        return loss


@dataclass(slots=True)
class FoldGuidance(Objective):
    """The guided output in one evaluation (Meng et al. 2023, with one guidance, stage one)."""

    pool: Pool = field(kw_only=True)
    guidance_scale: float = field(kw_only=True)

    def loss(self, student: Any, average: Any, batch: Batch) -> Any:
        """Return the mean squared error of the output."""
        import torch

        x, t, text = self._noised(self.pool, batch, self.levels.weights())
        states = self._told(text, batch, 0.0)
        empty = self.texts.empty.to(batch.device)
        wanted = ask_guided(self.teacher, x, t, states, empty, self.guidance_scale)
        return torch.nn.functional.mse_loss(ask(student, x, t, states), wanted)


@dataclass(slots=True)
class FollowTrajectories(Objective):
    """One DDIM step where the teacher's guided trajectory took several.

    Progressive distillation (Salimans & Ho 2022) in one go, on trajectories that were drawn before:
    the student is only ever asked where its sampler will ask it, and the right answer is known.
    """

    trajectories: Trajectories = field(kw_only=True)
    steps: int = field(kw_only=True)

    def loss(self, student: Any, average: Any, batch: Batch) -> Any:
        """Return the squared error of the picture that the step sees, by the noise it sees it in.

        That is the error of v, whatever the model predicts.
        """
        import torch

        grid = torch.tensor(self.levels.grid(self.steps), device=batch.device)
        chosen = batch.choose(len(self.trajectories.x))
        # One from each stratum: every step has its share of each batch.
        place = (np.arange(batch.size) + batch.rng.random()) * self.steps / batch.size
        step = torch.from_numpy(place.astype(np.int64) % self.steps)
        x = self.trajectories.x[chosen, step].to(batch.device)
        x_to = self.trajectories.x[chosen, step + 1].to(batch.device)
        t, to = grid[step], grid[step + 1]
        output = ask(student, x, t, self.texts.of(self.trajectories.text[chosen], batch.device))
        x0, _ = self.levels.x0_and_eps(output, x, t)
        wanted = self.levels.x0_for_jump(x, t, x_to, to)
        _, s = self.levels.split(t)
        errors = ((x0 - wanted) / s).square().mean((1, 2, 3))
        for index in range(self.steps):
            at = errors.detach()[(step == index).to(errors.device)]
            if len(at):
                self.parts[f"step {index + 1}"] = at.mean()
        return errors.mean()


@dataclass(slots=True)
class Consistency(Objective):
    """Latent consistency in phases.

    Luo et al. 2023, "Latent Consistency Models": the teacher makes one guided DDIM step, and from
    there the student's average must lead where the student leads. Wang et al. 2024, "Phased
    Consistency Models": to the end of the phase, one for each step, rather than to the picture.
    """

    pool: Pool = field(kw_only=True)
    steps: int = field(kw_only=True)
    teacher_steps: int = field(kw_only=True)
    guidance_scale: float = field(kw_only=True)

    def loss(self, student: Any, average: Any, batch: Batch) -> Any:
        """Return the pseudo-Huber distance of the two ends, as pictures by the noise."""
        import torch

        grid = torch.tensor(self.levels.grid(self.teacher_steps), device=batch.device)
        span = self.teacher_steps // self.steps
        place = (np.arange(batch.size) + batch.rng.random(batch.size)) / batch.size
        index = torch.from_numpy((place * self.teacher_steps).astype(np.int64))
        t, nearer, edge = grid[index], grid[index + 1], grid[(index // span + 1) * span]
        chosen = batch.choose(len(self.pool.latents))
        x0 = self.pool.latents[chosen].to(batch.device)
        noise = batch.normal(x0.shape)
        # A sampler begins with noise alone, which the last timestep is not quite.
        first = (index == 0).to(batch.device)[:, None, None, None]
        x = torch.where(first, noise, self.levels.noised(x0, noise, t))
        states = self.texts.of(self.pool.text[chosen], batch.device)
        empty = self.texts.empty.to(batch.device)
        with torch.no_grad():
            guided = ask_guided(self.teacher, x, t, states, empty, self.guidance_scale)
            x_nearer = self.levels.jump(guided, x, t, nearer)
            beyond = ask(average, x_nearer, nearer.clamp(min=0), states)
            there = (nearer == edge)[:, None, None, None]
            x_edge = self.levels.jump(beyond, x_nearer, nearer.clamp(min=0), edge)
            x_edge = torch.where(there, x_nearer, x_edge)
            wanted = self.levels.x0_for_jump(x, t, x_edge, edge)
        seen, _ = self.levels.x0_and_eps(ask(student, x, t, states), x, t)
        _, s = self.levels.split(t)
        apart = ((seen - wanted) / s).square()
        return ((apart + _HUBER**2).sqrt() - _HUBER).mean()


def describe(parts: Mapping[str, Any]) -> dict[str, float]:
    """Return the parts of a loss as numbers."""
    return {name: float(value) for name, value in parts.items()}


class Features:
    """Keeps the last output of each block of a teacher and of a student.

    Blocks are those on the way down, in the middle and on the way up, where both have one.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        names = [name for name in block_names(teacher) if name in block_names(student)]
        self.teacher: dict[str, Any] = {}
        self.student: dict[str, Any] = {}
        self._handles = [
            module.get_submodule(name).register_forward_hook(_keeper(kept, name))
            for module, kept in ((teacher, self.teacher), (student, self.student))
            for name in names
        ]

    def close(self) -> None:
        """Take the hooks off, and forget what they kept."""
        for handle in self._handles:
            handle.remove()
        self.teacher.clear()
        self.student.clear()


def block_names(unet: Any) -> list[str]:
    """Return the names of the blocks of diffusers' UNet2DConditionModel."""
    names = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    if unet.mid_block is not None:
        names.append("mid_block")
    return names + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]


def feature_loss(features: Features) -> Any:
    """Return the mean over the blocks of ||student - teacher||^2 / ||teacher||^2, a tensor.

    Blocks whose shapes differ are left out.
    """
    import torch

    losses = []
    for name, wanted in features.teacher.items():
        given = features.student.get(name)
        if given is not None and given.shape == wanted.shape:
            scale = wanted.float().square().mean().clamp_min(1e-12)
            losses.append((given.float() - wanted.float()).square().mean() / scale)
    return torch.stack(losses).mean()


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def keep(module: Any, args: Any, output: Any) -> None:
        # The way down gives its states, and those of the skips.
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep
