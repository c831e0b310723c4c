"""A resumable training loop whose learning rate anneals fully within a time budget."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muon import Muon, is_matrix

LossFunction = Callable[[int, np.random.Generator, float], torch.Tensor]


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that a step is never cut in the middle."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class Settings:
    """How one stage is trained."""

    name: str
    seconds: float  # the budget; the learning rate reaches zero at its end
    steps: int | None = None  # a budget in steps instead, for runs that must repeat exactly
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    ema_decay: float = 0.999
    seed: int = 0
    muon: bool = False  # matrices and convolutions by Muon, the rest by AdamW
    report_seconds: float = 10.0
    checkpoint_seconds: float = 60.0


def _optimizers(settings: Settings, module: torch.nn.Module) -> list[Any]:
    """Return the optimizers of a module's parameters that are trained."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if settings.muon and is_matrix(n, p)}
    others = [p for name, p in trained.items() if name not in matrices]
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    found: list[Any] = []
    if others:
        found.append(torch.optim.AdamW(others, betas=(0.9, 0.99), **common))
    if matrices:
        found.append(Muon(matrices.values(), **common))
    return found


class Loop:
    """Trains a module; Ctrl-C keeps a checkpoint, and running again goes on from it.

    Every step draws its data and noise from generators seeded by (seed, step), so there is no
    random state to save, and with a budget in steps a resumed run equals an uninterrupted one.
    """

    def __init__(self, settings: Settings, module: torch.nn.Module, work: Path) -> None:
        self.settings = settings
        self.module = module
        self.path = work / f"{settings.name}.pt"
        self.device = next(module.parameters()).device
        self.optimizers = _optimizers(settings, module)
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        self.loss = math.nan
        if self.path.exists():
            self._load()

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        if self.settings.steps is not None:
            return min(self.step / self.settings.steps, 1.0)
        return min(self.seconds / self.settings.seconds, 1.0)

    def run(self, loss_function: LossFunction) -> None:
        """Train until the budget is spent, then finish.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the checkpoint is saved.
        """
        reported = saved = time.monotonic()
        with _interrupts() as interrupted:
            while self.progress < 1.0 and not interrupted.is_set():
                began = time.monotonic()
                self._one_step(loss_function)
                now = time.monotonic()
                self.seconds += now - began
                if now - reported > self.settings.report_seconds:
                    self._report()
                    reported = now
                if now - saved > self.settings.checkpoint_seconds:
                    self.save()
                    saved = now
        self.save()
        if interrupted.is_set():
            raise KeyboardInterrupt
        self.finish()

    def finish(self) -> None:
        """Leave the averaged weights in the module."""
        self.module.load_state_dict(self.ema)

    def _one_step(self, loss_function: LossFunction) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        rng = np.random.default_rng((settings.seed, self.step))
        warm = min(1.0, (self.step + 1) / settings.warmup_steps)
        rate = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_function(self.step, rng, self.progress)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._update_average()
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value

    def _update_average(self) -> None:
        # A young average forgets its random start quickly.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value.detach(), 1 - decay)
            else:
                self.ema[name].copy_(value)

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the previous one."""
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]

    def _report(self) -> None:
        left = self.seconds / max(self.progress, 1e-9) - self.seconds
        print(
            f"{self.settings.name}: {self.progress:4.0%}, step {self.step}, loss {self.loss:.4f}, "
            f"{left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )
