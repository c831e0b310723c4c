"""The machine that a benchmark runs on: what its numbers depend on, and what it stands in for."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.compress.targets import detect
from sdvino.runtime.topology import LIMIT, read_cpu

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("openvino", "openvino-genai", "nncf", "optimum-intel", "diffusers", "torch")

#: What `--isa` takes; "native" is this machine as it is.
ISAS = ("native", "avx2-vnni")
#: A laptop's instruction set on a machine that has more: oneDNN (in OpenVINO and in torch), and
#: torch's own kernels.
_AVX2_VNNI = {LIMIT: "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"}


@dataclass(frozen=True, slots=True)
class Isa:
    """The instruction set of a run."""

    #: As `sdvino convert --target` names it.
    name: str
    environment: Mapping[str, str]
    #: OpenVINO's INFERENCE_PRECISION_HINT for everybody; None: each its own way.
    precision: str | None
    #: Where another one was asked for: a sentence that says so.
    note: str = ""
    #: bf16 is faster than f32 (see `sdvino.runtime.topology.bf16_is_fast`).
    fast_bf16: bool = False

    @property
    def label(self) -> str:
        """What the tables call it: a stand-in is not a machine that has no more."""
        return f"{self.name} as stand-in" if self.environment else self.name


def choose_isa(asked: str, named: Collection[str], *, fast_bf16: bool = False) -> Isa:
    """Return what a run with ``--isa asked`` uses on a processor with so ``named`` instructions.

    ``named`` is `CpuReport.isa`. A processor without VNNI cannot stand in for one that has it; nor
    can one that has it only among its AVX-512 instructions, whose kernels are then those of AVX2.
    """
    native = detect(named)
    if asked == "native":
        return Isa(native, {}, None, fast_bf16=fast_bf16)
    if native == "avx2":
        return Isa(
            native,
            {},
            None,
            "This processor has no VNNI and cannot stand in for a laptop with AVX2-VNNI;"
            " avx2, which it has, was used instead.",
        )
    # bf16 does not compile under that limit, so f32 is asked of everybody.
    if "AVX-VNNI" in named:
        return Isa("avx2-vnni", _AVX2_VNNI, "f32")
    return Isa(
        "avx2",
        _AVX2_VNNI,
        "f32",
        "This processor has VNNI among its AVX-512 instructions alone: kept to AVX2-VNNI, it runs"
        " the kernels of AVX2, which is what was measured.",
    )


def best_precision(isa: Isa) -> str | None:
    """Return the precision in which OpenVINO is fastest: f32, or bf16 (its own default there)."""
    return None if isa.name == "amx" or isa.fast_bf16 else "f32"


def about_machine() -> dict[str, str]:
    """Return what the numbers depend on: processor, memory, system, versions of the libraries."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    except (OSError, StopIteration):
        pass
    usable = read_cpu().usable
    found = {"cpu": f"{cpu}, {usable} of {os.cpu_count()} threads"}
    versions = {name: _version(name) for name in LIBRARIES}
    return found | {name: version for name, version in versions.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def machine_line(about: Mapping[str, str]) -> str:
    """Return what `about_machine` found as one line."""
    return ", ".join(of if name == "cpu" else f"{name} {of}" for name, of in about.items())


def installed_bytes(roots: Collection[str]) -> int:
    """Return the bytes of the distributions ``roots`` and of all that they need, each once.

    What is read is this environment: with CUDA's torch it is several gigabytes more. What is not
    installed counts nothing.
    """
    return sum(map(_distribution_bytes, closure(roots)))


def closure(roots: Collection[str]) -> set[str]:
    """Return the normalized names of installed distributions that ``roots`` bring along.

    A root or a requirement may name extras in brackets, as pip takes them.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    left = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            try:
                needed = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            seen.add((name, extra))
            for text in needed:
                found = Requirement(text)
                if found.marker is None or found.marker.evaluate({"extra": extra}):
                    left.append(found)
    return {name for name, _ in seen}


def _distribution_bytes(name: str) -> int:
    files = metadata.files(name) or []
    return sum(map(_size, (Path(str(file.locate())) for file in files)))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``."""
    return sum(map(_size, files_below(folder)))


def files_below(folder: Path) -> Iterator[Path]:
    """Give the files below ``folder``, compiled Python left out."""
    return (file for file in folder.rglob("*") if "__pycache__" not in file.parts)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0
