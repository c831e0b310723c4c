"""The process's ov.Core, what its devices report, and OpenVINO's errors in one sentence."""

from __future__ import annotations

import functools
import re
import threading

import openvino as ov

from sdvino.errors import DeviceError
from sdvino.runtime.properties import DeviceFacts
from sdvino.runtime.topology import read_cpu

_WHERE = re.compile(r"^(Exception from|Check '|While validating|\[ GENERAL_ERROR|\[GENERAL_ERROR)")
_CHECK = re.compile(r"^Check '.*?' failed at \S+?:(?:\d+:?)?\s*")
_LONGEST = 160


_making = threading.Lock()


def shared_core() -> ov.Core:
    """Return the one Core of this process: plugins are loaded once."""
    with _making:
        return _core()


@functools.cache
def _core() -> ov.Core:
    # OpenVINO makes its tables of types when they are first asked for, and lets other threads run
    # meanwhile: two that ask at once then wait for each other for ever (2026.4). So one does.
    ov.Type.f32.to_dtype()
    ov.Type(float)
    return ov.Core()


def device_facts(core: ov.Core, device: str) -> DeviceFacts:
    """Ask ``device`` (CPU, GPU.1 ...) what it can do; raises DeviceError if it does not answer."""
    try:
        supported = frozenset(core.get_property(device, "SUPPORTED_PROPERTIES"))
        capabilities = frozenset(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    except RuntimeError as error:
        raise DeviceError(
            f"The device {device} does not answer ({short_reason(error)});"
            " reinstall its driver, or use --device CPU."
        ) from error
    if device != "CPU":
        return DeviceFacts(supported=supported, capabilities=capabilities)
    cpu = read_cpu()
    # Where the instruction set cannot be read: processors with float16 arithmetic have AMX.
    amx = "amx_bf16" in cpu.flags if cpu.flags else "FP16" in capabilities
    return DeviceFacts(supported=supported, capabilities=capabilities, amx=amx, cpu=cpu)


def short_reason(error: Exception) -> str:
    """Return the one line of OpenVINO's exception text that says what went wrong."""
    reasons = []
    for line in str(error).splitlines():
        text = _CHECK.sub("", line.strip())
        if text and _WHERE.match(text) is None:
            reasons.append(text)
    reason = reasons[-1] if reasons else type(error).__name__
    reason = reason.rstrip(".:;")
    return reason if len(reason) <= _LONGEST else reason[: _LONGEST - 3] + "..."
