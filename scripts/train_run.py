"""Where and how one training run of the demo model happens."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_loop import Settings

STAGES = ("autoencoder", "pool", "text", "unet", "decoder", "tiny")
# Shares of the budget; the pool is drawn and encoded in what is left.
SHARES = {"autoencoder": 0.17, "text": 0.03, "unet": 0.60, "decoder": 0.10, "tiny": 0.03}


@dataclass(frozen=True)
class Run:
    """Where and how one training run happens."""

    out: Path
    work: Path
    device: torch.device
    seconds: float
    steps: int | None
    scenes_in_pool: int
    batch: int
    compiled: bool
    #: An earlier folder to go on from; its encoder is taken as it is.
    init: Path | None = None

    @property
    def pool(self) -> Path:
        """Where the encoded scenes are kept."""
        return self.work / "pool.pt"

    def settings(self, name: str, **changes: Any) -> Settings:
        """Return a stage's settings: its share of the budget, or `steps` of them."""
        budget = self.seconds * SHARES[name]
        return Settings(name=name, seconds=budget, steps=self.steps, **changes)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bfloat16 where it is faster: on CUDA and on CPUs with bfloat16 instructions."""
        context: contextlib.AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self._has_bfloat16()
        )
        return context

    def _has_bfloat16(self) -> bool:
        if self.device.type == "cuda":
            return True
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module to the device, its images channels last."""
        return module.to(device=self.device, memory_format=torch.channels_last)


def say(message: str) -> None:
    """Tell the person watching."""
    print(message, file=sys.stderr, flush=True)
