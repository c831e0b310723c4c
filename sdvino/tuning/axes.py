"""What `sdvino tune` tries on a machine: pure functions of what the machine is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from sdvino.runtime.defaults import cpu_defaults
from sdvino.runtime.properties import DeviceFacts, linear_kernel
from sdvino.runtime.topology import CpuReport
from sdvino.settings import CoreType, DeviceSettings, GuidanceMode, LinearKernel, Precision
from sdvino.tuning.search import Axis, Candidate

#: How guidance runs its two predictions: one after the other, as a batch of two, side by side.
GUIDANCE_MODES: tuple[GuidanceMode, ...] = get_args(GuidanceMode)
_GUIDANCE_LABELS: dict[GuidanceMode, str] = {
    "sequential": "one after the other",
    "batch": "a batch of two",
    "streams": "two streams",
}
_KERNEL_LABELS: dict[LinearKernel, str] = {
    "matmul": "linear layers as products",
    "convolution": "linear layers as convolutions",
}
#: Precision -> the capability that a device lists for it.
_FLAGS: dict[Precision, str] = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is tried: settings of a device, and for the UNet how guidance runs."""

    settings: DeviceSettings
    #: None: one prediction is measured, otherwise the two of a guided step.
    guidance_mode: GuidanceMode | None = None


def axes(
    component: str,
    facts: Mapping[str, DeviceFacts],
    devices: Sequence[str],
    *,
    eight_bits: bool = False,
) -> list[Axis[Choice]]:
    """Return what to try for ``component`` on the hardware ``devices`` that ``facts`` describe.

    ``eight_bits``: its activations are in 8 bits.
    """
    cpu = facts["CPU"].cpu if "CPU" in facts else None
    return [
        Axis(
            "device and precision",
            lambda best: places(component, best, facts, devices, eight_bits=eight_bits),
        ),
        Axis("cores", lambda best: cores(best, cpu)),
        Axis("pinning", lambda best: pinnings(best, facts)),
        Axis("linear layers", lambda best: linear_kernels(component, best, cpu)),
    ]


def places(
    component: str,
    best: Choice,
    facts: Mapping[str, DeviceFacts],
    devices: Sequence[str],
    *,
    eight_bits: bool = False,
) -> list[Candidate[Choice]]:
    """Return every device with every arithmetic it has, what is the default first."""
    found: list[Candidate[Choice]] = []
    for device in devices:
        entry = facts[device]
        default = entry.precision_for(device, component, eight_bits=eight_bits).precision
        own: list[Precision] = [
            precision
            for precision, flag in _FLAGS.items()
            if flag in entry.capabilities and not device.startswith("NPU")
        ]
        names: list[Precision | None] = [default]
        names += [precision for precision in own if precision != default]
        for precision in names:
            label = device if precision is None else f"{device}, {precision}"
            settings = replace(best.settings, device=device, precision=precision)
            found.append(Candidate(label, replace(best, settings=settings)))
    here = best.settings.device
    return sorted(found, key=lambda candidate: candidate.settings.settings.device != here)


def cores(best: Choice, cpu: CpuReport | None) -> list[Candidate[Choice]]:
    """Return sets of cores to run on, those of `cpu_defaults` first; none on other devices."""
    if cpu is None or best.settings.device != "CPU":
        return []
    default = cpu_defaults(cpu, core_type=best.settings.core_type)
    found = [Candidate(f"default: {default.why}", best)]
    seen = {(default.num_threads, default.core_type, False)}
    for count, kind, both in _core_sets(cpu):
        if (count, kind, both) in seen or (kind is None and (count, "any", both) in seen):
            continue
        seen.add((count, kind, both))
        settings = replace(
            best.settings,
            num_threads=count,
            core_type=kind,
            # Left open where it says nothing new, so that the device's own rule stands.
            hyper_threading=True if both else None,
        )
        found.append(Candidate(_label(count, kind, both), replace(best, settings=settings)))
    return found


def _core_sets(cpu: CpuReport) -> list[tuple[int, CoreType | None, bool]]:
    """Return (threads, core type, both threads of a core) worth a try, within the quota."""
    performance, efficient, _ = cpu.cores
    every = performance + efficient
    hybrid = performance > 0 and efficient > 0
    found: list[tuple[int, CoreType | None, bool]] = []
    if hybrid:
        found += [(performance, "performance", False), (every, "any", False)]
        found += [(efficient, "efficient", False)]
    else:
        found += [(every, None, False), (every // cpu.sockets, None, False)]
    if every >= 4:
        # One core left to the desktop; half, where memory and not arithmetic is the limit.
        kind: CoreType | None = "any" if hybrid else None
        found += [(every - 1, kind, False), (every // 2, kind, False)]
    if cpu.usable > every:
        found.append((cpu.usable, "any" if hybrid else None, True))
        if hybrid:
            found.append((2 * performance, "performance", True))
    limit = cpu.usable if cpu.quota is None else min(cpu.quota, cpu.usable)
    return [(min(count, limit), kind, both) for count, kind, both in found if count >= 1]


def _label(count: int, kind: CoreType | None, both: bool) -> str:
    threads = "1 thread" if count == 1 else f"{count} threads"
    where = {"performance": " on performance cores", "efficient": " on efficient cores"}
    return threads + where.get(str(kind), "") + (", two to a core" if both else "")


def pinnings(best: Choice, facts: Mapping[str, DeviceFacts]) -> list[Candidate[Choice]]:
    """Return threads kept on their cores or not, the device's own rule first."""
    device = best.settings.device
    if device != "CPU" or "ENABLE_CPU_PINNING" not in facts[device].supported:
        return []
    if best.settings.pinning is not None:
        return []
    return [
        Candidate("default", best),
        *(
            Candidate(
                "pinned" if pinning else "not pinned",
                replace(best, settings=replace(best.settings, pinning=pinning)),
            )
            for pinning in (True, False)
        ),
    ]


def linear_kernels(component: str, best: Choice, cpu: CpuReport | None) -> list[Candidate[Choice]]:
    """Return the ways to run the UNet's linear layers in 8 bits, the default first.

    They are a small part of the other components.
    """
    if component != "unet" or cpu is None or best.settings.device != "CPU":
        return []
    default = linear_kernel(cpu.isa)
    names = sorted(get_args(LinearKernel), key=lambda name: name != default)
    return [
        Candidate(
            _KERNEL_LABELS[name],
            best
            if name == default
            else replace(best, settings=replace(best.settings, linear_kernel=name)),
        )
        for name in names
    ]


def guidance_modes(best: Choice) -> list[Candidate[Choice]]:
    """Return the ways to run a guided step's two predictions."""
    return [
        Candidate(_GUIDANCE_LABELS[mode], replace(best, guidance_mode=mode))
        for mode in GUIDANCE_MODES
    ]
