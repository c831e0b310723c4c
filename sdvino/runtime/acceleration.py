"""What pays on a device: precision, quantization and graph rewrites, as a table.

Pure functions of a device's name and a processor's instruction sets. Where the table says
"measured", docs/ has the measurement; the rest follows OpenVINO's documents, and a GPU or NPU is
yet to be measured. The conversion writes the choice into sdvino.json, and a run on a matching
device takes from there what nobody asked for otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from sdvino.errors import RequestError
from sdvino.folder.manifest import Accelerated
from sdvino.settings import DeviceSettings, LinearKernel, Precision, RunSettings

CpuClass = Literal["avx2", "avx2-vnni", "avx512-vnni", "amx", "arm"]

#: Instruction set, as `CpuReport.isa` names it -> class; the first that is there counts.
_BY_ISA: tuple[tuple[str, CpuClass], ...] = (
    ("AMX-INT8", "amx"),
    ("AVX512-VNNI", "avx512-vnni"),
    ("AVX-VNNI", "avx2-vnni"),
    ("AVX2", "avx2"),
    ("NEON", "arm"),
)
_DEVICE = re.compile(r"[A-Z][A-Z0-9_]*(\.[0-9]+)?")
_LISTS = ("HETERO", "AUTO")


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """What to do for one device."""

    #: As the manifest stores it.
    stored: Accelerated
    #: The recipe that pays there.
    recipe: str
    #: The model that quantization makes for it: `--target` (see `sdvino.compress.targets`).
    target: str | None
    #: The reasons, a sentence each.
    why: tuple[str, ...]

    @property
    def summary(self) -> str:
        """Return the choice for people, in a line."""
        stored = self.stored
        target = "" if self.target is None else f" made for {self.target}"
        precision = "its own choice of precision" if stored.precision is None else stored.precision
        rewrites = ", ".join(stored.rewrites) if stored.rewrites else "none"
        return (
            f"recipe {self.recipe}{target}, {precision} for float layers, graph rewrites:"
            f" {rewrites}"
        )

    def lines(self) -> list[str]:
        """Return the choice, and below it the reasons."""
        device, kind = self.stored.device, self.stored.kind
        name = device if kind == device.lower() else f"{device} ({kind})"
        return [f"{name}: {self.summary}", *(f"  {reason}" for reason in self.why)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One kind of device."""

    precision: Precision | None
    recipe: str
    target: str | None
    rewrites: tuple[str, ...]
    why: tuple[str, ...]


#: See `sdvino.graph.linears`.
CONVOLVED_LINEARS = "linears-to-convolutions"
#: See `sdvino.graph.norms`.
CHANNEL_NORMS = "group-norms-to-channels"
_EXACT = ("split-projections", "fold-scales", "text-keys")
_SPLITS = "Cut projections are copied by a reference kernel (measured): two products copy nothing."

#: Kind of device -> what pays there.
TABLE: Mapping[str, _Row] = MappingProxyType(
    {
        "avx2": _Row(
            precision="f32",
            recipe="int8",
            target="avx2",
            rewrites=(*_EXACT, CONVOLVED_LINEARS, CHANNEL_NORMS),
            why=(
                "Products of 8 bits are summed in 16 bits, so weights take half of their range"
                " (measured: error 6.3 to 3.2 %).",
                "Attention's own products stay in float: without VNNI they run as plain gemm.",
                "So would linear layers: as convolutions they run twice as fast (measured).",
                "An autoencoder's small group norms as means of channels: its tensors are not"
                " reordered for them.",
                _SPLITS,
            ),
        ),
        "avx2-vnni": _Row(
            precision="f32",
            recipe="int8",
            target="avx2-vnni",
            rewrites=_EXACT,
            why=(
                "VNNI adds up 8-bit products exactly and about twice as fast (measured at the size"
                " of Stable Diffusion 1.5: 9.1 to 3.7 s).",
                "Attention in 8 bits too (measured: 4.2 to 3.7 s).",
                _SPLITS,
            ),
        ),
        "avx512-vnni": _Row(
            precision=None,
            recipe="int8",
            target="avx512-vnni",
            rewrites=_EXACT,
            why=(
                "VNNI (measured at the size of Stable Diffusion 1.5: 5 to 1.9 s).",
                "Floats in f32, as bf16 without AMX is slower (measured on a Xeon); but AMD's from"
                " Zen 4 on run what 8 bits leave of UNet and autoencoder in bf16 (measured: 1.8 to"
                " 1.4 s).",
                "Attention in float is as fast as in 8 bits (measured).",
                _SPLITS,
            ),
        ),
        "amx": _Row(
            precision="bf16",
            recipe="int8",
            target="amx",
            rewrites=_EXACT,
            why=("AMX multiplies tiles of int8 and of bf16: what stays in float runs in bf16.",),
        ),
        "arm": _Row(
            precision=None,
            recipe="int8-weights",
            target=None,
            rewrites=("text-keys",),
            why=("OpenVINO's kernels for ARM compute in float; small weights save memory.",),
        ),
        "gpu": _Row(
            precision="f16",
            recipe="int8",
            target="gpu",
            rewrites=("fold-scales", "text-keys"),
            why=(
                "Twice as fast in f16 as in f32; its 8-bit kernels want activations around zero.",
                "Attention stays in float, where there is a fused kernel.",
            ),
        ),
        "npu": _Row(
            precision=None,
            recipe="int8",
            target="gpu",
            rewrites=("fold-scales", "text-keys"),
            why=("It computes in f16 and int8, in shapes that are fixed when it compiles.",),
        ),
        "plugin": _Row(
            precision=None,
            recipe="fp16",
            target=None,
            rewrites=(),
            why=(
                "Nothing is known of this device: the graph is left as it was exported. Where it"
                " multiplies 8-bit numbers of one scale, try the recipe global.",
            ),
        ),
    }
)
#: Kinds that a machine is known to be of, where it is said to be, and that have one precision:
#: others' is left to `sdvino.runtime.defaults`, which knows the maker and the component.
_CERTAIN = ("amx",)
#: From the least compression to the most, for devices that share a model.
_MILDEST = ("fp16", "int8-weights", "int8-hybrid", "int8")
#: Targets whose models are right on the others too, the safest first.
_SAFEST = ("avx2", "gpu", "amx", "avx512-vnni", "avx2-vnni")


def cpu_class(isa: Collection[str]) -> CpuClass:
    """Return the class of a processor with the instruction sets ``isa`` (see `CpuReport.isa`).

    Where they cannot be told (Windows does not say whether there is VNNI), avx2.
    """
    return next((name for flag, name in _BY_ISA if flag in isa), "avx2")


def linear_kernel(isa: Collection[str]) -> LinearKernel:
    """Return how a processor with the instruction sets ``isa`` runs linear layers in 8 bits."""
    row = TABLE[cpu_class(isa)]
    return "convolution" if CONVOLVED_LINEARS in row.rewrites else "matmul"


def channel_norms(isa: Collection[str]) -> bool:
    """Return whether group norms of the autoencoder pay as means of channels with ``isa``."""
    return CHANNEL_NORMS in TABLE[cpu_class(isa)].rewrites


def isa_of(kind: str) -> tuple[str, ...]:
    """Return an instruction set that makes a processor of ``kind``; none for other devices."""
    return tuple(flag for flag, name in _BY_ISA if name == kind)


def accelerate(device: str, isa: Collection[str] = ()) -> Acceleration:
    """Return what pays on ``device``, a device's name or a kind of the table.

    CPU is the processor with the instruction sets ``isa``. HETERO and AUTO lists take what all of
    their devices take; other names are plugins. Raises RequestError for what is no device's name.
    """
    name = device.strip()
    if name.lower() in TABLE:
        kind = name.lower()
        place = {"gpu": "GPU", "npu": "NPU"}.get(kind, "CPU")
        return _made("PLUGIN" if kind == "plugin" else place, kind, TABLE[kind])
    base, colon, rest = name.upper().partition(":")
    if base in _LISTS:
        return _shared(name.upper(), [accelerate(part, isa) for part in _parts(base, rest)])
    if colon or _DEVICE.fullmatch(base) is None:
        raise RequestError(
            f"{device!r} is no device; give a name of `sdvino devices`, HETERO:GPU,CPU, or one of:"
            f" {', '.join(TABLE)}."
        )
    kind = kind_of(base, isa)
    return _made(base, kind, TABLE[kind])


def _parts(base: str, rest: str) -> list[str]:
    """Return the devices of a list; AUTO without any is a CPU and a GPU, but for those excluded."""
    words = [word.strip() for word in rest.split(",") if word.strip()]
    named = [word for word in words if not word.startswith("-")]
    if base == "AUTO" and not named:
        named = [device for device in ("CPU", "GPU") if f"-{device}" not in words]
    if not named:
        raise RequestError(f"{base} needs the devices to run on, such as {base}:GPU,CPU.")
    return named


def kind_of(device: str, isa: Collection[str]) -> str:
    """Return the row of the table for one device, such as CPU or GPU.1."""
    plain = device.partition(".")[0]
    if plain == "CPU":
        return cpu_class(isa)
    return plain.lower() if plain in ("GPU", "NPU") else "plugin"


def matching(
    stored: Sequence[Accelerated], device: str, isa: Collection[str]
) -> Accelerated | None:
    """Return what a folder stores for ``device`` of this machine, or None.

    A CPU matches by its class: what was chosen for another processor is no default here. GPU
    stands for every GPU.
    """
    name = device.strip().upper()
    virtual = name.partition(":")[0] in _LISTS
    names = {name} if virtual else {name, name.partition(".")[0]}
    return next(
        (
            entry
            for entry in stored
            if entry.device in names and (virtual or entry.kind == kind_of(name, isa))
        ),
        None,
    )


def with_stored(
    settings: RunSettings, stored: Sequence[Accelerated], isa: Collection[str]
) -> RunSettings:
    """Return ``settings`` with what nobody asked for taken from the folder's choice.

    Only where the kind of device is certain, and says it all: a GPU may lack f16, and a processor
    that tells of no VNNI may have AMX (Windows). Elsewhere `sdvino.runtime.defaults` chooses.
    """

    def filled(own: DeviceSettings) -> DeviceSettings:
        found = matching(stored, own.device, isa)
        if found is None or own.precision is not None or found.kind not in _CERTAIN:
            return own
        return replace(own, precision=found.precision)

    if not stored:
        return settings
    components = {name: filled(own) for name, own in settings.components.items()}
    return replace(settings, default=filled(settings.default), components=components)


def _made(device: str, kind: str, row: _Row) -> Acceleration:
    return Acceleration(
        stored=Accelerated(
            device=device, kind=kind, precision=row.precision, rewrites=row.rewrites
        ),
        recipe=row.recipe,
        target=row.target,
        why=row.why,
    )


def _shared(device: str, parts: Sequence[Acceleration]) -> Acceleration:
    """Return what pays where several devices run one model: what none of them minds."""
    first = parts[0]
    rewrites = tuple(
        name
        for name in first.stored.rewrites
        if all(name in part.stored.rewrites for part in parts)
    )
    targets = [part.target for part in parts if part.target is not None]
    return Acceleration(
        stored=Accelerated(
            device=device,
            kind="+".join(dict.fromkeys(part.stored.kind for part in parts)),
            # Each part runs in what is best there; one for all would suit one of them.
            precision=None,
            rewrites=rewrites,
        ),
        recipe=min((part.recipe for part in parts), key=_MILDEST.index),
        target=min(targets, key=_SAFEST.index) if len(targets) == len(parts) else None,
        why=("What all of its devices take:", *dict.fromkeys(w for p in parts for w in p.why)),
    )
