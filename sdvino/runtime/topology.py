"""The processor: its cores by type, its instruction sets, and what of it this process may use.

What is read from the system (files on Linux, a system call on Windows) is kept apart from what is
made of it, so that machines other than this one can be tested from their records.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

_CPU = "/sys/devices/system/cpu"
_CGROUP = "/sys/fs/cgroup"
#: Instruction sets that decide how fast a quantized model runs: our name -> names in /proc/cpuinfo.
_ISA = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX-VNNI": ("avx_vnni",),
    "AVX512-VNNI": ("avx512_vnni",),
    "AVX512-BF16": ("avx512_bf16",),
    "AVX512-FP16": ("avx512_fp16",),
    "AMX-INT8": ("amx_int8",),
    "AMX-BF16": ("amx_bf16",),
    "AMX-FP16": ("amx_fp16",),
    "NEON": ("asimd",),
    "dot product": ("asimddp",),
}
CpuClass = Literal["avx2", "avx2-vnni", "avx512-vnni", "amx", "arm"]
#: Instruction set -> class of processors; the first that is there counts.
_CLASSES: Mapping[str, CpuClass] = {
    "AMX-INT8": "amx",
    "AVX512-VNNI": "avx512-vnni",
    "AVX-VNNI": "avx2-vnni",
    "AVX2": "avx2",
    "NEON": "arm",
}
#: oneDNN's variable, which keeps its kernels (most of OpenVINO's on a CPU) to an instruction set,
#: and what of the flags above each value leaves; others leave everything. Source: oneDNN's "CPU
#: Dispatcher Control".
LIMIT = "ONEDNN_MAX_CPU_ISA"
_LEFT_BY_LIMIT = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2",),
    "AVX2_VNNI": ("avx2", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "avx_vnni"),
    "AVX512_CORE": ("avx2", "avx512f"),
    "AVX512_CORE_VNNI": ("avx2", "avx512f", "avx512_vnni"),
    "AVX512_CORE_BF16": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
}
#: IsProcessorFeaturePresent of the Windows API -> the flag in /proc/cpuinfo.
_WINDOWS_FEATURES = {40: "avx2", 41: "avx512f", 19: "asimd", 43: "asimddp"}


class Cores(NamedTuple):
    """Physical cores by type."""

    performance: int
    efficient: int = 0
    low_power: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuReport:
    """A processor as this process sees it."""

    #: Physical cores that are online, by type. Chips of one kind have performance cores only.
    performance_cores: int
    efficient_cores: int = 0
    low_power_cores: int = 0
    #: Logical processors that are online.
    threads: int = 1
    #: Logical processors that the process may run on (its affinity).
    usable: int = 1
    #: Sockets among those processors.
    sockets: int = 1
    #: Physical cores among those processors; None: not known, take all that are online.
    usable_cores: Cores | None = None
    #: Processors' worth of time that a container grants, rounded up; None: no limit.
    quota: int | None = None
    #: Names as in /proc/cpuinfo; empty where they cannot be read.
    flags: frozenset[str] = frozenset()
    #: As in /proc/cpuinfo: GenuineIntel, AuthenticAMD; empty where it cannot be read.
    vendor: str = ""
    #: Whether `LIMIT` took some of them away.
    limited: bool = False

    @property
    def cores(self) -> Cores:
        """The physical cores that the process may run on, as far as that is known."""
        if self.usable_cores is not None:
            return self.usable_cores
        return Cores(self.performance_cores, self.efficient_cores, self.low_power_cores)

    @property
    def isa(self) -> tuple[str, ...]:
        """The instruction sets that matter here, by their usual names."""
        return tuple(name for name, flags in _ISA.items() if self.flags.issuperset(flags))


def cpu_class(isa: Collection[str]) -> CpuClass:
    """Return the class of a processor with the instruction sets ``isa`` (see `CpuReport.isa`).

    Where they cannot be told (Windows does not say whether there is VNNI), avx2.
    """
    return next((name for flag, name in _CLASSES.items() if flag in isa), "avx2")


def bf16_is_fast(cpu: CpuReport | None) -> bool:
    """Return whether ``cpu``, without AMX, computes in bf16 faster than in f32.

    AMD's do from Zen 4 on (measured, docs/profile.md). Intel's took longer where they had bf16 and
    no AMX (measured on a Xeon).
    """
    return cpu is not None and cpu.vendor == "AuthenticAMD" and "AVX512-BF16" in cpu.isa


def read_cpu() -> CpuReport:
    """Describe this machine's processor, within `LIMIT`; what cannot be read is a default."""
    return within_limit(_read_cpu(), os.environ.get(LIMIT, ""))


def within_limit(cpu: CpuReport, limit: str) -> CpuReport:
    """Return ``cpu`` with the instruction sets that ``limit``, the value of `LIMIT`, leaves it."""
    left = _LEFT_BY_LIMIT.get(limit.upper())
    if left is None:
        return cpu
    names = {name for names in _ISA.values() for name in names}
    kept = cpu.flags - {name for name in names - set(left) if name.startswith(("avx", "amx"))}
    return replace(cpu, flags=kept, limited=kept != cpu.flags)


def _read_cpu() -> CpuReport:
    threads = os.cpu_count() or 1
    try:
        if sys.platform == "win32":
            return windows_cpu(
                _windows_records(), threads=threads, usable=threads, features=_windows_features()
            )
        if sys.platform.startswith("linux"):
            affinity = frozenset(os.sched_getaffinity(0))
            return linux_cpu(_linux_files(), usable=len(affinity), affinity=affinity)
    except (OSError, ValueError, AttributeError, struct.error):
        pass
    return CpuReport(performance_cores=threads, threads=threads, usable=threads)


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format: ``0-3,8,10-11``. Raises ValueError for anything else."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < 2**16:
            raise ValueError(f"{part!r} is no range of processors")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)


def linux_cpu(
    files: Mapping[str, str], *, usable: int, affinity: frozenset[int] | None = None
) -> CpuReport:
    """Describe a processor from the texts of its files in /sys and /proc.

    Hybrid chips list their core types in /sys/devices/cpu_core, cpu_atom and cpu_lowpower.
    ``usable`` counts the processors of the process's ``affinity``, whose numbers may be unknown.
    """
    online = parse_cpu_list(files.get(f"{_CPU}/online", ""))
    if not online:
        online = frozenset(range(max(1, usable)))
    own = online if affinity is None or not affinity & online else affinity & online
    everything = _count_cores(files, online)
    packages = {
        files.get(f"{_CPU}/cpu{cpu}/topology/physical_package_id", "0").strip() for cpu in own
    }
    return CpuReport(
        performance_cores=everything.performance,
        efficient_cores=everything.efficient,
        low_power_cores=everything.low_power,
        threads=len(online),
        usable=min(usable, len(online)),
        sockets=len(packages),
        usable_cores=_count_cores(files, own),
        quota=cgroup_quota(files),
        flags=frozenset(_cpuinfo(files, "flags", "Features").split()),
        vendor=_cpuinfo(files, "vendor_id"),
    )


def _count_cores(files: Mapping[str, str], cpus: frozenset[int]) -> Cores:
    """Count the physical cores that ``cpus`` belong to."""
    efficient = parse_cpu_list(files.get("/sys/devices/cpu_atom/cpus", ""))
    low_power = parse_cpu_list(files.get("/sys/devices/cpu_lowpower/cpus", ""))
    counts = [0, 0, 0]
    seen: set[frozenset[int]] = set()
    for cpu in sorted(cpus):
        siblings = files.get(f"{_CPU}/cpu{cpu}/topology/thread_siblings_list")
        core = parse_cpu_list(siblings) if siblings else frozenset({cpu})
        if core not in seen:
            seen.add(core)
            counts[2 if cpu in low_power else 1 if cpu in efficient else 0] += 1
    return Cores(*counts)


def cgroup_quota(files: Mapping[str, str]) -> int | None:
    """Return a container's share of processors, rounded up; None where there is no limit."""
    words = files.get(f"{_CGROUP}/cpu.max", "").split()
    if len(words) != 2:
        words = [
            files.get(f"{_CGROUP}/cpu/cpu.cfs_{part}_us", "").strip()
            for part in ("quota", "period")
        ]
    quota, period = words
    if not quota.isdigit() or not period.isdigit() or int(period) == 0 or int(quota) == 0:
        return None
    return math.ceil(int(quota) / int(period))


def _cpuinfo(files: Mapping[str, str], *names: str) -> str:
    """Return what the first of ``names`` in /proc/cpuinfo is; empty where there is none."""
    for line in files.get("/proc/cpuinfo", "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _linux_files() -> dict[str, str]:
    names = [
        f"{_CPU}/online",
        "/sys/devices/cpu_atom/cpus",
        "/sys/devices/cpu_lowpower/cpus",
        f"{_CGROUP}/cpu.max",
        f"{_CGROUP}/cpu/cpu.cfs_quota_us",
        f"{_CGROUP}/cpu/cpu.cfs_period_us",
        "/proc/cpuinfo",
    ]
    found = {name: text for name in names if (text := read_text(name)) is not None}
    for cpu in parse_cpu_list(found.get(f"{_CPU}/online", "")):
        for file in ("thread_siblings_list", "physical_package_id"):
            name = f"{_CPU}/cpu{cpu}/topology/{file}"
            text = read_text(name)
            if text is not None:
                found[name] = text
    return found


def read_text(name: str) -> str | None:
    """Return the text of a file of the system, or None when it cannot be read."""
    try:
        return Path(name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def windows_cpu(
    records: bytes, *, threads: int, usable: int, features: frozenset[str]
) -> CpuReport:
    """Describe a processor from GetLogicalProcessorInformationEx(RelationProcessorCore).

    Each record: relationship u32, size u32, flags u8, efficiency class u8, 20 reserved bytes, group
    count u16, then for each group a mask u64, its number u16 and 6 reserved bytes. The higher the
    class, the faster the core; chips of one kind have one class.
    """
    classes: list[int] = []
    logical = 0
    offset = 0
    while offset + 32 <= len(records):
        relationship, size = struct.unpack_from("<II", records, offset)
        if size < 32 or offset + size > len(records):
            break
        if relationship == 0:
            efficiency, groups = struct.unpack_from("<B20xH", records, offset + 9)
            classes.append(efficiency)
            for group in range(min(groups, (size - 32) // 16)):
                (mask,) = struct.unpack_from("<Q", records, offset + 32 + 16 * group)
                logical += mask.bit_count()
        offset += size
    if not classes:
        return CpuReport(performance_cores=threads, threads=threads, usable=usable, flags=features)
    kinds = sorted(set(classes), reverse=True)
    efficient = classes.count(kinds[1]) if len(kinds) > 1 else 0
    low_power = sum(classes.count(kind) for kind in kinds[2:])
    return CpuReport(
        performance_cores=classes.count(kinds[0]),
        efficient_cores=efficient,
        low_power_cores=low_power,
        threads=logical if logical else threads,
        usable=usable,
        flags=features,
    )


def _windows_records() -> bytes:
    if sys.platform != "win32":
        return b""
    kernel = ctypes.WinDLL("kernel32")
    size = ctypes.c_uint32(0)
    kernel.GetLogicalProcessorInformationEx(0, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if not kernel.GetLogicalProcessorInformationEx(0, buffer, ctypes.byref(size)):
        return b""
    return buffer.raw[: size.value]


def _windows_features() -> frozenset[str]:
    if sys.platform != "win32":
        return frozenset()
    kernel = ctypes.WinDLL("kernel32")
    return frozenset(
        flag
        for number, flag in _WINDOWS_FEATURES.items()
        if kernel.IsProcessorFeaturePresent(number)
    )
