"""What a compressed folder must keep, by how it was compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from sdvino.errors import RequestError

MAX_PSNR = 99.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits that the gate holds a folder to; None leaves one open."""

    #: Median over the pictures of their PSNR to the uncompressed pipeline's, dB, at least.
    psnr: float | None = None
    #: Median over the pictures of their SSIM, at least.
    ssim: float | None = None
    #: Component to the relative error of its output (root mean square over the inputs), at most.
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreatmentLimits:
    """The limits that one way of compressing is held to."""

    psnr: float
    ssim: float
    #: Relative error of any component's output.
    error: float


#: Documented defaults. Pictures: what is visibly the same picture (30 dB) to what nobody can tell
#: apart (40 dB). Errors of components are wider than a good conversion needs: they catch what is
#: broken, and are all there is to judge on random weights.
LIMITS: Mapping[str, TreatmentLimits] = MappingProxyType(
    {
        "fp16": TreatmentLimits(psnr=45.0, ssim=0.99, error=0.01),
        "int8-weights": TreatmentLimits(psnr=40.0, ssim=0.98, error=0.05),
        "int8-hybrid": TreatmentLimits(psnr=32.0, ssim=0.92, error=0.15),
        "int8": TreatmentLimits(psnr=30.0, ssim=0.90, error=0.20),
        "int4-weights": TreatmentLimits(psnr=25.0, ssim=0.80, error=0.25),
        "global": TreatmentLimits(psnr=25.0, ssim=0.80, error=0.35),
        "local": TreatmentLimits(psnr=25.0, ssim=0.80, error=0.25),
    }
)
_UNKNOWN = LIMITS["int8"]


class TreatsComponents(Protocol):
    """A recipe, as far as thresholds are concerned."""

    def treatment(self, component: str) -> str:
        """Return how ``component`` is stored."""
        ...


def default_thresholds(
    recipe: TreatsComponents, components: tuple[str, ...], *, min_psnr: float | None = None
) -> Thresholds:
    """Return the limits for ``components`` stored as ``recipe`` says.

    Pictures are held to the limits of the most compressed component; ``min_psnr`` (dB) replaces
    theirs. Raises RequestError for a PSNR that no pictures have.
    """
    if min_psnr is not None and not 0.0 < min_psnr <= MAX_PSNR:
        raise RequestError(f"--min-psnr is {min_psnr:g}; give dB, more than 0 and up to 99.")
    limits = {name: LIMITS.get(recipe.treatment(name), _UNKNOWN) for name in components}
    drawing = [limit for name, limit in limits.items() if name not in ("tiny_vae", "vae_encoder")]
    thresholds = Thresholds(
        psnr=min(limit.psnr for limit in drawing),
        ssim=min(limit.ssim for limit in drawing),
        components={name: limit.error for name, limit in limits.items()},
    )
    return thresholds if min_psnr is None else replace(thresholds, psnr=min_psnr)
