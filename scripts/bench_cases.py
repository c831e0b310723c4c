"""What bench_peers.py compares, as data and pure functions: cases, contenders, who takes part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench_machine import Isa, best_precision
from bench_worker import Job

#: In which group of peers a contender is: their default, the most they can be made to do, torch.
Group = Literal["sdvino", "default", "best", "torch"]

GROUP_TITLES: Mapping[Group, str] = {
    "sdvino": "sdvino",
    "default": "peers as they come: 8-bit weights",
    "best": "peers made to do their most: hybrid, the whole UNet in 8 bits",
    "torch": "diffusers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of picture that everybody makes."""

    name: str
    #: Of scripts/synthetic_architectures.py.
    arch: str
    side: int
    steps: int
    guidance: float
    #: sdvino's approximations, fields of its SpeedSettings. Peers have no such thing and are
    #: measured once, in the case `like`.
    speed: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None

    @property
    def title(self) -> str:
        """What the table calls it."""
        words = [f"{name} {_plain(value)}" for name, value in self.speed.items()]
        exact = "exact" if not words else "sdvino with " + " and ".join(words)
        return (
            f"{self.arch}, {self.side} x {self.side}, {self.steps} steps,"
            f" guidance {self.guidance:g}, {exact}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A program with a model in one format."""

    name: str
    group: Group
    #: A runner of bench_worker.py.
    runner: str
    #: Of bench_prepare.py.
    format: str
    #: Static shapes, the fastest precision and a cache of compiled models, where they are no
    #: default.
    tuned: bool = False
    dtype: str = "float32"
    #: Distributions that have to be installed.
    installs: tuple[str, ...] = ()


_OPTIMUM = ("optimum-intel[openvino]", "diffusers", "torch", "transformers")
_GENAI = ("openvino-genai",)
_TORCH = ("diffusers", "torch", "transformers", "accelerate")

SDVINO = Contender(
    name="sdvino", group="sdvino", runner="sdvino", format="sdvino", installs=("sdvino",)
)


def _peer(name: str, format_: str, group: Group = "default") -> Contender:
    optimum = name.startswith("optimum")
    return Contender(
        name=name,
        group=group,
        runner="optimum" if optimum else "genai",
        format=format_,
        tuned=group == "best",
        installs=_OPTIMUM if optimum else _GENAI,
    )


CONTENDERS: tuple[Contender, ...] = (
    SDVINO,
    _peer("optimum-intel", "weights8"),
    _peer("openvino-genai", "weights8"),
    _peer("optimum-intel hybrid", "hybrid", "best"),
    _peer("openvino-genai hybrid", "hybrid", "best"),
    _peer("optimum-intel full", "full", "best"),
    _peer("openvino-genai full", "full", "best"),
    Contender(
        name="diffusers f32", group="torch", runner="diffusers", format="source", installs=_TORCH
    ),
    Contender(
        name="diffusers bf16",
        group="torch",
        runner="diffusers",
        format="source",
        dtype="bfloat16",
        installs=_TORCH,
    ),
)

CASES: tuple[Case, ...] = (
    Case(name="sd15-4", arch="sd15", side=512, steps=4, guidance=1.0),
    Case(name="sd15-20", arch="sd15", side=512, steps=20, guidance=7.5),
    Case(name="sdxl-4", arch="sdxl", side=1024, steps=4, guidance=1.0),
    Case(
        name="sd15-4-fast",
        arch="sd15",
        side=512,
        steps=4,
        guidance=1.0,
        speed={"token_downsampling": 2, "tiny_vae": True},
        like="sd15-4",
    ),
    Case(
        name="sd15-20-fast",
        arch="sd15",
        side=512,
        steps=20,
        guidance=7.5,
        speed={"cache_interval": 2, "guidance_interval": (0.0, 0.8)},
        like="sd15-20",
    ),
    # For trying the machinery itself: seconds a picture.
    Case(name="tiny-4", arch="tiny-sd15", side=128, steps=4, guidance=1.0),
    Case(name="tiny-20", arch="tiny-sd15", side=128, steps=20, guidance=7.5),
)
DEFAULT_CASES = tuple(case.name for case in CASES if not case.name.startswith("tiny"))
#: `--quick`: one picture of one case, without what takes longest.
QUICK_CASE = "sd15-4"
QUICK_WITHOUT = ("diffusers bf16", "openvino-genai hybrid", "openvino-genai full")


class ChoiceError(Exception):
    """What was asked for does not exist; the message says what does."""


def choose_cases(names: Sequence[str]) -> list[Case]:
    """Return the cases called ``names``, in the order of the table, with those they are like.

    A case of sdvino's approximations needs the exact one, whose peers it is compared with.
    Raises ChoiceError.
    """
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise ChoiceError(f"Unknown case {name!r}; choose among: {', '.join(known)}.")
    wanted = set(names) | {like for name in names if (like := known[name].like) is not None}
    return [case for case in CASES if case.name in wanted]


def choose_contenders(names: Sequence[str] | None, *, isa: Isa, quick: bool) -> list[Contender]:
    """Return who takes part: ``names``, or all that make sense on ``isa``. Raises ChoiceError."""
    known = {contender.name: contender for contender in CONTENDERS}
    if names is not None:
        for name in names:
            if name not in known:
                raise ChoiceError(f"Unknown peer {name!r}; choose among: {', '.join(known)}.")
        return [SDVINO, *(known[name] for name in known if name in names and name != "sdvino")]
    # A laptop has no bf16, and torch would go through f32 and back.
    left_out = {"diffusers bf16"} if isa.precision is not None else set()
    left_out |= set(QUICK_WITHOUT) if quick else set()
    return [contender for contender in CONTENDERS if contender.name not in left_out]


def runs_of(case: Case, contenders: Sequence[Contender]) -> list[Contender]:
    """Return who is measured in ``case``: sdvino alone where the peers are those of another."""
    return [c for c in contenders if case.like is None or c.group == "sdvino"]


def missing_options(case: Case, draws: Callable[..., Any], known: Collection[str]) -> list[str]:
    """Return the approximations of ``case`` that this version of sdvino does not have.

    ``draws`` is the pipeline's call, ``known`` the fields of SpeedSettings.
    """
    if case.speed and "speed" not in inspect.signature(draws).parameters:
        return list(case.speed)
    return [name for name in case.speed if name not in known]


def properties(contender: Contender, isa: Isa) -> dict[str, str]:
    """Return OpenVINO's properties for a contender; torch takes none.

    Peers as they come have none but what the instruction set makes necessary. sdvino chooses for
    itself.
    """
    if contender.runner == "diffusers":
        return {}
    chosen: dict[str, str] = {}
    precision = best_precision(isa) if contender.tuned else isa.precision
    if precision is not None:
        chosen["INFERENCE_PRECISION_HINT"] = precision
    if isa.environment:
        # See sdvino.runtime.properties: without it nothing with 8-bit weights compiles.
        chosen["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    if contender.tuned:
        chosen["PERFORMANCE_HINT"] = "LATENCY"
    return chosen


def keeps_cache(contender: Contender) -> bool:
    """Return whether a contender keeps compiled models: sdvino does, peers when made to."""
    return contender.runner == "sdvino" or contender.tuned


def make_job(
    case: Case,
    contender: Contender,
    isa: Isa,
    *,
    folder: Path,
    result: Path,
    cache: Path | None,
    pictures: int,
) -> Job:
    """Return what a worker is to do for one measurement."""
    own = contender.group == "sdvino"
    return Job(
        runner=contender.runner,
        folder=str(folder),
        result=str(result),
        width=case.side,
        height=case.side,
        steps=case.steps,
        guidance=case.guidance,
        pictures=pictures,
        cache=str(cache) if cache is not None and keeps_cache(contender) else None,
        properties=properties(contender, isa),
        static=contender.tuned,
        dtype=contender.dtype,
        speed=case.speed if own else {},
    )


def formats_of(cases: Collection[Case], contenders: Collection[Contender]) -> list[tuple[str, str]]:
    """Return what has to be prepared: pairs of architecture and format, each once."""
    pairs = [
        (case.arch, contender.format)
        for case in cases
        for contender in runs_of(case, list(contenders))
    ]
    return list(dict.fromkeys(pairs))


def _plain(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
