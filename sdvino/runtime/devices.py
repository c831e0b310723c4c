"""What is here to run on: the report behind `sdvino devices`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openvino as ov

from sdvino.errors import DeviceError
from sdvino.runtime.compiling import rewrite_for
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.defaults import cpu_defaults
from sdvino.runtime.memory import MemoryStatus, memory_status
from sdvino.runtime.profile import Profile, ProfileStore, machine_name
from sdvino.runtime.topology import CpuReport, read_cpu
from sdvino.settings import DeviceSettings

#: Property of a GPU or NPU -> how the report calls it, and how the value is written.
_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "DEVICE_TYPE": ("type", lambda value: str(value).rpartition(".")[2].lower()),
    "DEVICE_ARCHITECTURE": ("architecture", str),
    "GPU_EXECUTION_UNITS_COUNT": ("execution units", str),
    "GPU_UARCH_VERSION": ("microarchitecture", str),
    "GPU_DEVICE_TOTAL_MEM_SIZE": ("memory it can reach", lambda size: f"{int(size) / 1e9:.1f} GB"),
    "NPU_DEVICE_TOTAL_MEM_SIZE": ("memory it can reach", lambda size: f"{int(size) / 1e9:.1f} GB"),
    "NPU_DRIVER_VERSION": ("driver", str),
    "NPU_COMPILER_VERSION": ("compiler", str),
}
#: Argument of `sdvino.graph.prepare.prepare_for_hardware` -> what it does.
_REWRITES = {
    "convolutions": "8-bit linears as convolutions",
    "biases": "zero points in biases",
    "channels": "group norms by channel",
}
_PRECISIONS = {"FP32": "f32", "FP16": "f16", "BF16": "bf16", "INT8": "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """One device that OpenVINO can run a model on."""

    #: As `--device` takes it: CPU, GPU, GPU.1, NPU.
    device: str
    full_name: str
    #: Arithmetic it has, best known first: f32, f16, bf16, int8.
    precisions: tuple[str, ...]
    #: What else it says about itself, in words: name to value.
    facts: dict[str, str] = field(default_factory=dict)
    #: What is used when nothing is asked for and nothing was measured, and why.
    defaults: dict[str, str] = field(default_factory=dict)
    #: Why it cannot be used, where it does not answer.
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """Everything that `sdvino devices` shows."""

    openvino: str
    memory: MemoryStatus
    cpu: CpuReport
    devices: tuple[DeviceReport, ...]
    #: What `sdvino tune` and earlier runs found out here, a line for each model.
    profiles: tuple[str, ...] = ()


def describe_machine(core: ov.Core | None = None) -> MachineReport:
    """Describe the machine and every device that OpenVINO finds on it; never raises for one."""
    core = shared_core() if core is None else core
    return MachineReport(
        openvino=ov.get_version(),
        memory=memory_status(),
        cpu=read_cpu(),
        devices=tuple(describe_devices(core)),
        profiles=tuple(
            describe_profile(profile)
            for profile in ProfileStore().all()
            if profile.key.machine == machine_name(core)
            and profile.key.openvino == str(ov.get_version())
        ),
    )


def describe_profile(profile: Profile) -> str:
    """Return one line of what ``profile`` holds."""
    parts = []
    if profile.tuned is not None:
        parts.append(f"tuned on {profile.tuned} for {profile.width} x {profile.height}")
    for name, tuned in profile.components.items():
        gain = tuned.default_seconds / tuned.seconds if tuned.seconds > 0 else 1.0
        parts.append(f"{name} on {tuned.settings.get('device', 'CPU')} {gain:.2f} x the defaults")
    for name, fallback in profile.fallbacks.items():
        parts.append(f"{name} moved to {fallback.device} in {fallback.precision}")
    parts += [f"{name} checked against the CPU" for name in profile.trusted]
    return f"{profile.name}: {'; '.join(parts) if parts else 'nothing yet'}"


def describe_devices(core: ov.Core | None = None) -> list[DeviceReport]:
    """Describe each of OpenVINO's available devices.

    A device that does not answer (a broken driver) is in the list too, with its problem.
    """
    core = shared_core() if core is None else core
    return [_describe(core, device) for device in core.available_devices]


def _describe(core: ov.Core, device: str) -> DeviceReport:
    try:
        full_name = str(core.get_property(device, "FULL_DEVICE_NAME")).strip()
        capabilities = list(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
        supported = set(core.get_property(device, "SUPPORTED_PROPERTIES"))
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[-1][:200] if str(error).strip() else "no answer"
        return DeviceReport(device=device, full_name=device, precisions=(), problem=problem)
    facts = _cpu_facts(read_cpu()) if device == "CPU" else _facts(core, device, supported)
    if "GPU_HW_MATMUL" in capabilities:
        facts["matrix units"] = "yes (XMX)"
    return DeviceReport(
        device=device,
        full_name=full_name,
        precisions=tuple(name for flag, name in _PRECISIONS.items() if flag in capabilities),
        facts=facts,
        defaults=_defaults(core, device),
    )


def _defaults(core: ov.Core, device: str) -> dict[str, str]:
    """Say what `sdvino.runtime.defaults` chooses for ``device``."""
    try:
        facts = device_facts(core, device)
    except DeviceError:
        return {}
    found: dict[str, str] = {}
    if facts.cpu is not None:
        cpu = cpu_defaults(facts.cpu)
        found["threads"] = f"{cpu.num_threads} ({cpu.why})"
    parts = [("arithmetic", None, False), ("arithmetic of the VAE", "vae_decoder", False)]
    if facts.fast_bf16:
        parts.append(("arithmetic of UNet and VAE in 8 bits", "unet", True))
    for title, component, eight_bits in parts:
        chosen = facts.precision_for(device, component, eight_bits=eight_bits)
        if chosen.precision is not None:
            found[title] = f"{chosen.precision} ({chosen.why})"
    for title, component in (("UNet", "unet"), ("VAE", "vae_decoder")):
        precision = facts.precision_for(device, component, eight_bits=True).precision
        rewrite = rewrite_for(component, DeviceSettings(), precision, {device: facts})
        made = [what for name, what in _REWRITES.items() if rewrite.arguments[name]]
        if made:
            found[f"rewrites of the {title}"] = ", ".join(made)
    return found


def _facts(core: ov.Core, device: str, supported: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, (title, write) in _FACTS.items():
        if name not in supported:
            continue
        try:
            found[title] = write(core.get_property(device, name))
        except (RuntimeError, TypeError, ValueError):  # a driver that promises and does not give
            continue
    return found


def _cpu_facts(cpu: CpuReport) -> dict[str, str]:
    kinds = [
        (cpu.performance_cores, "performance"),
        (cpu.efficient_cores, "efficient"),
        (cpu.low_power_cores, "low-power"),
    ]
    if sum(count > 0 for count, _ in kinds) > 1:
        cores = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    else:
        cores = str(sum(count for count, _ in kinds))
    facts = {"cores": cores, "threads": str(cpu.threads)}
    if cpu.usable < cpu.threads:
        facts["threads this process may use"] = str(cpu.usable)
    if cpu.quota is not None and cpu.quota < cpu.usable:
        facts["processors its container grants"] = str(cpu.quota)
    if cpu.isa:
        facts["instruction sets"] = ", ".join(cpu.isa)
    facts["AMX"] = "yes" if "amx_bf16" in cpu.flags else "no" if cpu.flags else "not known"
    return facts
