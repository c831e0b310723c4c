"""From `DeviceSettings` to OpenVINO's properties: pure functions, so every device can be tested.

Which property goes where follows the property lists of OpenVINO's CPU, GPU, NPU, AUTO and HETERO
plugins. A setting that only means something on a CPU (threads, cores) is left out on other devices,
because one set of settings may serve a pipeline whose parts run in several places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sdvino.errors import DeviceError
from sdvino.runtime.defaults import PrecisionDefault, cpu_defaults, default_precision
from sdvino.runtime.topology import CpuReport, bf16_is_fast, cpu_class
from sdvino.settings import DeviceSettings, LinearKernel

_VIRTUAL = ("AUTO", "HETERO")
#: Devices whose properties are known; others are plugins of vendors.
_KNOWN = ("CPU", "GPU", "NPU")
_CORE_TYPES = {"any": "ANY_CORE", "performance": "PCORE_ONLY", "efficient": "ECORE_ONLY"}
#: Which cores run the host's part of a GPU's work. Source: the GPU plugin's host_task_priority.
_HOST_PRIORITIES = {"any": "MEDIUM", "performance": "HIGH", "efficient": "LOW"}
#: Precision -> what a device lists among its OPTIMIZATION_CAPABILITIES when it has it.
_CAPABILITIES = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
_AUTOENCODER = ("vae_decoder", "vae_encoder")
#: Property -> how the setting is called on the command line.
_OPTIONS = {
    "NUM_STREAMS": "--streams",
    "INFERENCE_NUM_THREADS": "--threads",
    "SCHEDULING_CORE_TYPE": "--core-type",
    "ENABLE_CPU_PINNING": "--pinning",
    "ENABLE_HYPER_THREADING": "--hyper-threading",
    "INFERENCE_PRECISION_HINT": "--precision",
    "PERFORMANCE_HINT": "--performance-hint",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What a device reports about itself."""

    #: Names of its properties that may be set.
    supported: frozenset[str]
    #: Its OPTIMIZATION_CAPABILITIES.
    capabilities: frozenset[str]
    #: Matrix units for bf16 and int8 (CPU only).
    amx: bool = False
    #: The processor (CPU only); None leaves threads and cores to OpenVINO.
    cpu: CpuReport | None = None

    @property
    def fast_bf16(self) -> bool:
        """Whether bf16 is faster than f32 without AMX."""
        return bf16_is_fast(self.cpu)

    def precision_for(
        self, device: str, component: str | None, *, eight_bits: bool = False
    ) -> PrecisionDefault:
        """Return `default_precision` for ``component`` on ``device``, whose facts these are."""
        return default_precision(
            device,
            component,
            self.capabilities,
            amx=self.amx,
            fast_bf16=self.fast_bf16,
            eight_bits=eight_bits,
        )


def normalize_device(device: str, available: Collection[str]) -> str:
    """Return ``device`` as OpenVINO spells it, having checked that this machine has it.

    ``available`` are OpenVINO's available_devices; GPU stands for GPU.0. AUTO and HETERO may name
    devices after a colon (AUTO also excludes with a minus). Raises DeviceError.
    """
    name = device.strip().upper()
    base, colon, rest = name.partition(":")
    if base not in _VIRTUAL:
        _check_available(name, device, available)
        return name
    parts = [part.strip() for part in rest.split(",")] if colon else []
    if base == "HETERO" and not parts:
        raise DeviceError("HETERO needs the devices to split over, such as HETERO:GPU,CPU.")
    for part in parts:
        _check_available(part.removeprefix("-") if base == "AUTO" else part, device, available)
    return f"{base}:{','.join(parts)}" if parts else base


def _check_available(name: str, asked: str, available: Collection[str]) -> None:
    known = set(available)
    # With two GPUs, OpenVINO lists GPU.0 and GPU.1 and takes GPU; with one, GPU and takes GPU.0.
    known |= {device.partition(".")[0] for device in available}
    known |= {f"{device}.0" for device in available if device in ("GPU", "NPU")}
    if name not in known:
        names = ", ".join(sorted(available)) or "none"
        raise DeviceError(
            f"There is no device {name or '(empty)'!r} for {asked!r} here; available: {names}"
            f" (and {', '.join(_VIRTUAL)}). See `sdvino devices`."
        )


def hardware_of(device: str, available: Collection[str]) -> list[str]:
    """Return the hardware devices that the normalized ``device`` may run on."""
    base, _, rest = device.partition(":")
    if base not in _VIRTUAL:
        return [device]
    parts = rest.split(",") if rest else []
    named = [part for part in parts if not part.startswith("-")]
    excluded = {part[1:] for part in parts if part.startswith("-")}
    return named if named else [name for name in available if name not in excluded]


def compile_properties(
    settings: DeviceSettings,
    device: str,
    facts: Mapping[str, DeviceFacts],
    component: str | None = None,
    *,
    eight_bits: bool = False,
) -> dict[str, Any]:
    """Return the properties to compile ``component`` with on ``device`` (see `normalize_device`).

    ``eight_bits``: its activations are in 8 bits.

    ``facts`` holds every hardware device that ``device`` may run on. For AUTO and HETERO their
    properties go into DEVICE_PROPERTIES. Raises DeviceError for what a device does not take.
    """
    base = device.partition(":")[0]
    if base not in _VIRTUAL:
        return _hardware_properties(settings, device, facts[device], component, eight_bits)
    properties: dict[str, Any] = {
        "DEVICE_PROPERTIES": {
            name: _hardware_properties(settings, name, entry, component, eight_bits)
            for name, entry in facts.items()
        }
    }
    if base == "AUTO":
        properties["PERFORMANCE_HINT"] = settings.performance_hint.upper()
        # Otherwise the first steps run on the CPU while the GPU compiles: two numerics in one
        # picture.
        properties["ENABLE_STARTUP_FALLBACK"] = False
    return properties


def precision_in(properties: Mapping[str, Any]) -> str | None:
    """Return the precision that ``properties`` ask for on every device; None where they do not."""
    parts = properties.get("DEVICE_PROPERTIES", {"": properties}).values()
    asked = {part.get("INFERENCE_PRECISION_HINT") for part in parts}
    return asked.pop() if len(asked) == 1 else None


def linear_kernel(isa: Collection[str]) -> LinearKernel:
    """Return how a processor with the instruction sets ``isa`` runs linear layers in 8 bits.

    Without VNNI OpenVINO has no kernel for their products; convolutions are twice as fast
    (measured).
    """
    return "convolution" if cpu_class(isa) == "avx2" else "matmul"


def convolves_linears(settings: DeviceSettings, facts: Mapping[str, DeviceFacts]) -> bool:
    """Return whether linear layers in 8 bits are to run as convolutions.

    ``facts`` are of the hardware that the model may run on: on anything but CPUs they are products.
    """
    if settings.linear_kernel is not None and cpus_alone(facts):
        return settings.linear_kernel == "convolution"
    return _on_all_cpus(facts, lambda isa: linear_kernel(isa) == "convolution")


def norms_by_channel(
    component: str, precision: str | None, facts: Mapping[str, DeviceFacts]
) -> bool:
    """Return whether the group norms of ``component`` are to run as means of channels.

    ``precision`` is what floats are computed in. It pays where linear layers are convolutions too,
    and in the autoencoder alone: a UNet's norms gain nothing (measured).
    """
    return (
        component in _AUTOENCODER
        and precision == "f32"
        and _on_all_cpus(facts, lambda isa: cpu_class(isa) == "avx2")
    )


def cpus_alone(facts: Mapping[str, DeviceFacts]) -> bool:
    """Return whether ``facts`` are of CPUs, and of nothing else."""
    return bool(facts) and all(name.partition(".")[0] == "CPU" for name in facts)


def _on_all_cpus(facts: Mapping[str, DeviceFacts], pays: Callable[[Collection[str]], bool]) -> bool:
    """Return whether ``facts`` are of known CPUs alone, whose instruction sets all make it pay."""
    cpus = [entry.cpu for entry in facts.values()]
    return cpus_alone(facts) and all(cpu is not None and pays(cpu.isa) for cpu in cpus)


def _hardware_properties(
    settings: DeviceSettings,
    device: str,
    facts: DeviceFacts,
    component: str | None,
    eight_bits: bool,
) -> dict[str, Any]:
    properties: dict[str, Any] = {"PERFORMANCE_HINT": settings.performance_hint.upper()}
    kind = device.partition(".")[0]
    if kind == "CPU":
        properties |= _cpu_properties(settings, facts)
    if kind != "NPU":
        streams = settings.num_streams
        if streams is None and settings.performance_hint == "latency":
            streams = 1
        if streams is not None:
            properties["NUM_STREAMS"] = streams
    chosen = facts.precision_for(device, component, eight_bits=eight_bits)
    precision = _precision(settings, kind, device, facts, chosen.precision)
    if precision is not None:
        properties["INFERENCE_PRECISION_HINT"] = precision
    if kind not in _KNOWN:
        properties = _of_plugin(settings, properties, facts)
    for name in properties:
        if name not in facts.supported:
            raise DeviceError(
                f"{device} does not take {_OPTIONS[name]} ({name}) with this version of OpenVINO;"
                " leave it out, or update OpenVINO or the driver."
            )
    # What nobody asked for is left out silently where it is not known.
    wished: dict[str, Any] = {}
    if kind == "GPU" and precision == "f16" and chosen.activations_scale is not None:
        wished["ACTIVATIONS_SCALE_FACTOR"] = chosen.activations_scale
    if kind == "GPU":
        # One request at a time waits for the thread that feeds it: that one runs on a fast core.
        cores = "performance" if settings.core_type is None else settings.core_type
        wished["GPU_HOST_TASK_PRIORITY"] = _HOST_PRIORITIES[cores]
    wished |= _cpu_wishes(settings, facts) if kind == "CPU" else {}
    return properties | {
        name: value
        for name, value in wished.items()
        if name in facts.supported and name not in properties
    }


def _of_plugin(
    settings: DeviceSettings, properties: Mapping[str, Any], facts: DeviceFacts
) -> dict[str, Any]:
    """Return the properties for a vendor's plugin: defaults only where it takes them."""
    asked = {
        "PERFORMANCE_HINT": settings.performance_hint != DeviceSettings().performance_hint,
        "NUM_STREAMS": settings.num_streams is not None,
        "INFERENCE_PRECISION_HINT": settings.precision is not None,
    }
    return {
        name: value
        for name, value in properties.items()
        if name in facts.supported or asked.get(name, True)
    }


def _cpu_properties(settings: DeviceSettings, facts: DeviceFacts) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    if settings.num_threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.num_threads
    if settings.core_type is not None:
        properties["SCHEDULING_CORE_TYPE"] = _CORE_TYPES[settings.core_type]
    if settings.pinning is not None:
        properties["ENABLE_CPU_PINNING"] = settings.pinning
    if settings.hyper_threading is not None:
        properties["ENABLE_HYPER_THREADING"] = settings.hyper_threading
    return properties


def _cpu_wishes(settings: DeviceSettings, facts: DeviceFacts) -> dict[str, Any]:
    """Return what the processor asks for: threads and cores, where nobody chose them."""
    if facts.cpu is None:
        return {}
    chosen = cpu_defaults(
        facts.cpu, performance_hint=settings.performance_hint, core_type=settings.core_type
    )
    threads, cores = chosen.num_threads, chosen.core_type
    if settings.hyper_threading and threads is not None:
        # Two threads to a core, as asked: how many that is, OpenVINO knows; the quota still holds.
        threads = None if facts.cpu.quota is None else min(facts.cpu.quota, facts.cpu.usable)
    if settings.num_threads is not None and settings.num_threads > facts.cpu.cores.performance:
        cores = None  # more threads than there are performance cores mean the others too
    wished: dict[str, Any] = {}
    if threads is not None:
        wished["INFERENCE_NUM_THREADS"] = threads
    if cores is not None:
        wished["SCHEDULING_CORE_TYPE"] = _CORE_TYPES[cores]
    if facts.cpu.limited:
        # By the processor, not by the limit, OpenVINO decides to quantize what linear layers of
        # 8-bit weights are given; oneDNN then has no kernel, and nothing compiles.
        wished["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return wished


def _precision(
    settings: DeviceSettings, kind: str, device: str, facts: DeviceFacts, default: str | None
) -> str | None:
    """Return the precision to ask for; None leaves it to the device."""
    wanted = settings.precision
    if wanted is None:
        return default
    # Every CPU and GPU computes in f32, listed or not; an NPU does not.
    if _CAPABILITIES[wanted] not in facts.capabilities and (wanted != "f32" or kind == "NPU"):
        known = [name for name, flag in _CAPABILITIES.items() if flag in facts.capabilities]
        raise DeviceError(
            f"{device} does not compute in {wanted}; it has: {', '.join(known) or 'none'}."
        )
    return wanted
