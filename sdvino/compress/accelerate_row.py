"""The row `accelerate` of a recipe: the device whose choices go into sdvino.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdvino.compress.passes import Level, Pass
from sdvino.runtime.acceleration import accelerate


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerate(Pass):
    """Write down what pays on a device, for runs on one like it; without one, on `--target`."""

    kind: ClassVar[str] = "accelerate"
    level: ClassVar[Level] = "device"

    #: A device, a list such as HETERO:GPU,CPU, or a kind of `sdvino.runtime.acceleration.TABLE`;
    #: CPU is the processor of `--target`.
    device: str = "CPU"

    def __post_init__(self) -> None:
        accelerate(self.device)

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        return f"{self.kind} {self.device}"

    def refusal(self, earlier: Pass) -> str | None:
        """Refuse to name a device twice."""
        if isinstance(earlier, Accelerate) and earlier.device.upper() == self.device.upper():
            return f"{self.device} is accelerated already; write it once"
        return None
