"""How much memory a picture needs, how much there is, and how much was held at most."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.inputs.shown import gigabytes
from sdvino.runtime.topology import read_text

_log = logging.getLogger("sdvino")

#: Python, OpenVINO and their libraries, and what the C library keeps of freed memory.
PROCESS_BYTES = 200 * 10**6
#: What the CPU plugin holds for a byte of weights (docs/memory.md): one copy packed for the kernels
#: where it takes them as they are, and one folded to float32 before that where it does not.
_PACKED = 1.05
_FOLDED = {"f16": 4.0, "bf16": 4.0}
#: 8-bit weights of a convolution whose input is not quantized are folded to float32 too.
_FOLDED_CONVOLUTION = 8.0
#: Feature maps alive at once where a convolution network is widest: input, output, shortcut.
_LIVE_MAPS = 3
#: More of the machine's memory than this is not there, whatever is swapped out.
_USABLE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """Bytes of memory; None where the system does not say."""

    total: int | None
    #: What can be had without swapping.
    available: int | None
    #: What this process holds already.
    own: int = 0


def held_bytes(folder: ModelFolder, *parts: str) -> int:
    """Estimate the bytes that ``parts`` take while they are loaded; those not there take none."""
    irs = [folder.components[part].ir for part in parts if part in folder.components]
    return sum(
        int(size * _copies(kind, convolution, ir.quantized))
        for ir in irs
        for (kind, convolution), size in ir.weights.items()
    )


def _copies(kind: str, convolution: bool, quantized: bool) -> float:
    """Return the bytes held on a CPU for a byte of weights of the element type ``kind``."""
    if kind in ("i8", "u8") and convolution and not quantized:
        return _FOLDED_CONVOLUTION
    return _FOLDED.get(kind, _PACKED)


def picture_bytes(height: int, width: int) -> int:
    """Return the bytes of a picture in 8 bits and in float."""
    return height * width * 3 * 5


def decoder_bytes(folder: ModelFolder, height: int, width: int, tile: int | None = None) -> int:
    """Estimate the decoder's activations for a picture, or for tiles of ``tile`` pixels."""
    side = (height, width) if tile is None else (min(height, tile), min(width, tile))
    return side[0] * side[1] * _width_at_full_size(folder) * 4 * _LIVE_MAPS


def unet_bytes(folder: ModelFolder, height: int, width: int) -> int:
    """Estimate the UNet's activations for a picture of ``height`` x ``width`` pixels."""
    factor = folder.vae_scale_factor
    latents = (height // factor) * (width // factor)
    config = folder.components["unet"].config
    blocks = config.get("block_out_channels")
    channels = blocks[0] if isinstance(blocks, list) and blocks and _plain(blocks[0]) else 320
    # Skip connections keep every level's maps until the way up: some ten of the widest level's.
    return latents * channels * 4 * 10 + _attention_bytes(config, latents)


def _attention_bytes(config: Mapping[str, Any], latents: int) -> int:
    """Return the bytes of one head's attention matrix at the UNet's largest self-attention.

    Kernels that never hold the whole matrix still take that many operations, so a picture for
    which it would not fit is out of this machine's reach either way.
    """
    kinds = config.get("down_block_types")
    if not isinstance(kinds, list):
        return latents**2 * 4
    levels = [i for i, kind in enumerate(kinds) if "Attn" in str(kind)]
    return 0 if not levels else (latents // 4 ** levels[0]) ** 2 * 4


def _width_at_full_size(folder: ModelFolder) -> int:
    """Return the channels with which the decoder reaches the picture's full size.

    diffusers' AutoencoderKL upsamples to it in the width of the level before the last.
    """
    blocks = folder.components["vae_decoder"].config["block_out_channels"]
    widths = [width for width in blocks[:2] if _plain(width)]
    return max(widths, default=128)


def _plain(value: object) -> bool:
    return type(value) is int and 0 < value < 2**16


def check_memory(needed: int, status: MemoryStatus | None = None) -> None:
    """Raise RequestError when ``needed`` bytes are more than this machine has.

    What this process holds already counts as available: it is part of ``needed``. When it would
    fit only by swapping, that is said in the log.
    """
    status = memory_status() if status is None else status
    if status.total is not None and needed > status.total * _USABLE_SHARE:
        raise RequestError(
            f"This picture needs about {gigabytes(needed)} of memory and the machine has"
            f" {gigabytes(status.total)}; ask for a smaller height and width."
        )
    if status.available is not None and needed > status.available + status.own:
        _log.warning(
            "This needs about %s of memory and %s are free: it may be slow; close other programs"
            " or ask for a smaller picture.",
            gigabytes(needed),
            gigabytes(status.available + status.own),
        )


def return_memory() -> None:
    """Give freed memory back to the system where the C library would keep it (glibc)."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library, which does so by itself


def memory_status() -> MemoryStatus:
    """Ask the operating system; a container's limit counts as its memory."""
    try:
        if sys.platform == "win32":
            return _windows_status()
        if sys.platform.startswith("linux"):
            return linux_status(_linux_files())
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return MemoryStatus(pages * size, None)
    except (OSError, ValueError, AttributeError):
        return MemoryStatus(None, None)


_CGROUP = "/sys/fs/cgroup"
_LINUX_FILES = (
    "/proc/meminfo",
    "/proc/self/statm",
    f"{_CGROUP}/memory.max",
    f"{_CGROUP}/memory.current",
    f"{_CGROUP}/memory.stat",
    f"{_CGROUP}/memory/memory.limit_in_bytes",
    f"{_CGROUP}/memory/memory.usage_in_bytes",
    f"{_CGROUP}/memory/memory.stat",
)


def _linux_files() -> dict[str, str]:
    return {name: text for name in _LINUX_FILES if (text := read_text(name)) is not None}


def linux_status(files: Mapping[str, str]) -> MemoryStatus:
    """Read the texts of `_LINUX_FILES`, those that there are."""
    facts = _pairs(files.get("/proc/meminfo", ""))
    total, available = facts.get("MemTotal"), facts.get("MemAvailable")
    for limit_file, usage_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        limit = _number(files.get(f"{_CGROUP}/{limit_file}"))
        if limit is None or (total is not None and limit >= total):
            continue
        total = limit
        used = _number(files.get(f"{_CGROUP}/{usage_file}"))
        if used is not None:
            cache = _pairs(files.get(f"{_CGROUP}/{stat_file}", "")).get(cache_key, 0)
            free = max(0, limit - used + cache)
            available = free if available is None else min(available, free)
    words = files.get("/proc/self/statm", "").split()
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    own = int(words[1]) * page if len(words) > 1 and words[1].isdigit() else 0
    return MemoryStatus(total, available, own)


def _pairs(text: str) -> dict[str, int]:
    """Return the numbers of lines such as ``MemTotal: 8 kB`` or ``inactive_file 8``, in bytes."""
    pairs: dict[str, int] = {}
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            pairs[words[0]] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return pairs


def _number(text: str | None) -> int | None:
    text = "" if text is None else text.strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


class _MemoryStatusEx(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


class _ProcessMemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("working_set", ctypes.c_size_t),
        ("quota", ctypes.c_size_t * 4),
        ("page_file", ctypes.c_size_t),
        ("peak_page_file", ctypes.c_size_t),
    )


def _windows_status() -> MemoryStatus:
    if sys.platform != "win32":
        return MemoryStatus(None, None)
    kernel = ctypes.WinDLL("kernel32")
    status = _MemoryStatusEx()
    status.length = ctypes.sizeof(status)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return MemoryStatus(None, None)
    counters = _windows_counters()
    own = 0 if counters is None else int(counters.working_set)
    return MemoryStatus(int(status.total), int(status.available), own)


def _windows_counters() -> _ProcessMemoryCounters | None:
    """Return what this process holds; None where no one says."""
    if sys.platform != "win32":
        return None
    kernel = ctypes.WinDLL("kernel32")
    counters = _ProcessMemoryCounters()
    counters.size = ctypes.sizeof(counters)
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    known = kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return counters if known else None


def peak_memory() -> int | None:
    """Return the peak of this process's resident memory in bytes; None where no one says.

    Mapped pages of files count as soon as they are in memory: VmHWM on Linux, the peak working set
    on Windows, ru_maxrss elsewhere.
    """
    if sys.platform == "win32":
        counters = _windows_counters()
        return None if counters is None else int(counters.peak_working_set)
    if sys.platform.startswith("linux"):
        return linux_peak(read_text("/proc/self/status") or "")
    try:
        import resource
    except ImportError:
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def linux_peak(status: str) -> int | None:
    """Read VmHWM from the text of a process's /proc/PID/status; None where it has none."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if name == "VmHWM" and words and words[0].isdigit():
            return int(words[0]) * 1024
    return None
