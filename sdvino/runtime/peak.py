"""The most memory that this process has held so far, as the operating system counts it."""

from __future__ import annotations

import ctypes
import sys

from sdvino.runtime.topology import read_text


def peak_memory() -> int | None:
    """Return the peak of this process's resident memory in bytes; None where no one says.

    Mapped pages of files count as soon as they are in memory: VmHWM on Linux, the peak working set
    on Windows, ru_maxrss elsewhere.
    """
    if sys.platform == "win32":
        return _windows_peak()
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


def _windows_peak() -> int | None:
    if sys.platform != "win32":
        return None
    from sdvino.runtime.memory import ProcessMemoryCounters

    kernel = ctypes.WinDLL("kernel32")
    counters = ProcessMemoryCounters()
    counters.size = ctypes.sizeof(counters)
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    known = kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return int(counters.peak_working_set) if known else None
