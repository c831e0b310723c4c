"""Where the seconds of a call go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Seconds spent, by part, summed over the pictures of a call."""

    load: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    #: Evaluations of the UNet, each a conditional or an unconditional one.
    unet_evaluations: int = 0

    @property
    def total(self) -> float:
        """Return the seconds of all parts."""
        return self.load + self.text + self.denoise + self.decode


@contextmanager
def clock(timings: Timings, part: str) -> Iterator[None]:
    """Add the seconds of a block to one part of ``timings``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(timings, part, getattr(timings, part) + time.perf_counter() - started)
