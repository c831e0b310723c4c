"""How much the gate compares, what that costs, and what a folder must keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from sdvino.errors import RequestError

MAX_PSNR = 99.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How a conversion is judged. Raises RequestError for values that cannot be."""

    #: Least median PSNR of the pictures, dB; None takes the recipe's own (see `LIMITS`).
    min_psnr: float | None = None
    #: Minutes that comparing and mending may take together.
    minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.min_psnr is not None and not 0.0 < self.min_psnr <= MAX_PSNR:
            raise RequestError(f"--min-psnr is {self.min_psnr:g}; give dB, above 0 and up to 99.")
        if not 0.0 < self.minutes <= 100_000.0:
            raise RequestError(
                f"--gate-minutes is {self.minutes:g}; give minutes above 0, or --no-gate."
            )


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
    theirs.
    """
    limits = {name: LIMITS.get(recipe.treatment(name), _UNKNOWN) for name in components}
    drawing = [limit for name, limit in limits.items() if name not in ("tiny_vae", "vae_encoder")]
    thresholds = Thresholds(
        psnr=min(limit.psnr for limit in drawing),
        ssim=min(limit.ssim for limit in drawing),
        components={name: limit.error for name, limit in limits.items()},
    )
    return thresholds if min_psnr is None else replace(thresholds, psnr=min_psnr)


#: Share of the time allowed that the first comparison may take; the rest is for mending.
_FIRST_SHARE = 0.6
_PICTURES = (16, 12, 8, 6, 4, 3, 2)
#: Steps below the model's own, as shares of them, when two pictures are still too long.
_STEP_SHARES = (0.75, 0.5, 0.35, 0.2)
_FEWEST_STEPS = 4
#: Prompts whose trajectories are followed with float inputs.
_REPLAYED = 4
# A VAE decoder costs about as much as three UNet evaluations at the same size, its encoder half
# of that (Stable Diffusion 1.5, 512 x 512).
_DECODE, _ENCODE = 3.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePlan:
    """What is compared."""

    #: Pictures, one prompt and seed each.
    pictures: int
    #: Steps of each.
    steps: int
    #: Pictures, from the first, whose UNet inputs are given to the compressed UNet too.
    replayed: int
    #: Whether finished pictures are compared, or components alone.
    finished: bool = True

    def evaluations(self, a_step: int) -> float:
        """Return the cost in UNet evaluations, of which a step takes ``a_step``."""
        trajectories = self.pictures * self.steps * a_step
        replays = self.replayed * self.steps * a_step
        decodes = self.pictures * (2 * _DECODE + 2 * _ENCODE)
        return trajectories * (2 if self.finished else 1) + replays + decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What the float folder took, in seconds."""

    #: Reading and compiling its components.
    load: float
    #: One UNet evaluation.
    evaluation: float
    #: Evaluations that a step takes: two with guidance, twice that for Heun.
    evaluations_a_step: int = 1

    def seconds(self, plan: GatePlan) -> float:
        """Return what ``plan`` takes, both folders together (the compressed one no faster)."""
        return 2 * self.load + plan.evaluations(self.evaluations_a_step) * self.evaluation


def fit_plan(speed: Speed, *, prompts: int, steps: int, minutes: float) -> GatePlan:
    """Return the largest plan within the share of ``minutes`` that comparing may take.

    The smallest one is returned when none fits: `Speed.seconds` tells.
    """
    allowed = _FIRST_SHARE * 60 * minutes
    plan = None
    for plan in _plans(prompts, steps):
        if speed.seconds(plan) <= allowed:
            return plan
    assert plan is not None
    return plan


def components_only(plan: GatePlan) -> GatePlan:
    """Return ``plan`` without finished pictures: for weights that draw nothing."""
    few = min(plan.pictures, _REPLAYED)
    return replace(plan, pictures=few, replayed=few, finished=False)


def _plans(prompts: int, steps: int) -> Iterator[GatePlan]:
    """Yield plans from the most telling to the cheapest."""
    for count in _PICTURES:
        if count <= prompts or count == _PICTURES[-1]:
            pictures = min(count, prompts)
            yield GatePlan(pictures=pictures, steps=steps, replayed=min(pictures, _REPLAYED))
    few = min(2, prompts)
    for share in _STEP_SHARES:
        fewer = min(steps, max(_FEWEST_STEPS, round(share * steps)))
        yield GatePlan(pictures=few, steps=fewer, replayed=1)
    yield GatePlan(pictures=1, steps=min(steps, _FEWEST_STEPS), replayed=1, finished=False)
