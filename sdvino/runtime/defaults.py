"""What to run with when nobody said and nothing was measured: pure functions of the machine."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from sdvino.runtime.topology import CpuReport
from sdvino.settings import CoreType, GuidanceMode, PerformanceHint, Precision

#: From so many efficient cores to a performance core on, all of them together are faster than the
#: few fast ones alone. Source: OpenVINO's own rule for the latency hint (its CPU plugin takes both
#: kinds from this ratio on, whatever the model's precision).
MANY_EFFICIENT = 4
#: What the activations of an autoencoder in f16 are divided by on a GPU: its largest values are
#: beyond f16's 65504 in Stable Diffusion XL. Source: the value that optimum-intel writes into
#: exported autoencoders of Stable Diffusion XL.
VAE_ACTIVATIONS_SCALE = 128.0
_AUTOENCODERS = ("vae_decoder", "vae_encoder")
#: Components that may compute in bf16 without AMX. A text encoder may not: it is a small part of
#: the time, and its rounding made another picture of one in 32 (measured on the demo model).
_NARROW = ("unet", *_AUTOENCODERS, "tiny_vae")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuDefaults:
    """Threads and cores for inference on a CPU."""

    #: None leaves the number to OpenVINO.
    num_threads: int | None
    #: None: the chip has one type of cores, or all types are used.
    core_type: CoreType | None
    #: The reason, as the end of a sentence.
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionDefault:
    """Arithmetic of float layers on a device."""

    #: None leaves it to the device.
    precision: Precision | None
    why: str
    #: What the activations are divided by, so that f16 holds them; None: nothing.
    activations_scale: float | None = None


def cpu_defaults(
    cpu: CpuReport,
    *,
    performance_hint: PerformanceHint = "latency",
    core_type: CoreType | None = None,
) -> CpuDefaults:
    """Return threads and cores for one inference at a time on ``cpu``.

    One thread to each physical core: a core's two hardware threads share the arithmetic units that
    convolutions keep busy. On hybrid chips the performance cores alone, because a layer ends with
    its slowest thread; where there are few of them (`MANY_EFFICIENT`), all. On several sockets, one
    socket. Never more than a container's share of time. ``core_type`` is what the user chose.
    For throughput OpenVINO places its streams itself, within the container's share.
    """
    limited = cpu.quota is not None and cpu.quota < cpu.usable
    if performance_hint == "throughput":
        return CpuDefaults(
            num_threads=cpu.quota if limited else None,
            core_type=core_type,
            why="the container grants no more" if limited else "OpenVINO divides the cores",
        )
    count, chosen, why = _cores(cpu, core_type)
    if cpu.sockets > 1:
        count = max(1, math.ceil(count / cpu.sockets))
        why = f"the physical cores of one of {cpu.sockets} sockets"
    if cpu.quota is not None and cpu.quota < count:
        count, why = cpu.quota, "the container grants no more"
    return CpuDefaults(num_threads=max(1, count), core_type=chosen, why=why)


def _cores(cpu: CpuReport, core_type: CoreType | None) -> tuple[int, CoreType | None, str]:
    """Return how many cores to use, of which type, and why."""
    performance, efficient, low_power = cpu.cores
    if core_type == "performance" and performance:
        return performance, core_type, "the performance cores, as asked"
    if core_type == "efficient" and efficient + low_power:
        return efficient + low_power, core_type, "the efficient cores, as asked"
    both = performance + efficient
    if core_type is not None:
        return both if both else low_power, core_type, "every core, as asked"
    if not both:
        return low_power, None, "the low-power cores, which are all it may use"
    if not performance or not efficient:
        return both, None, "every physical core that it may use"
    if efficient >= MANY_EFFICIENT * performance:
        few = f"{performance} performance cores alone are too few beside {efficient} efficient ones"
        return both, "any", f"every core, because {few}"
    return performance, "performance", "the performance cores; efficient ones hold a layer up"


def default_precision(
    device: str,
    component: str | None,
    capabilities: Collection[str],
    *,
    amx: bool = False,
    fast_bf16: bool = False,
    eight_bits: bool = False,
) -> PrecisionDefault:
    """Return the arithmetic for ``component`` on the hardware ``device`` (CPU, GPU.1, NPU).

    ``capabilities`` are the device's OPTIMIZATION_CAPABILITIES. OpenVINO's own default on a CPU
    with bf16 instructions is bf16, which without AMX is slower than f32 as well as less exact on
    most. Where it is faster, ``fast_bf16``, a component with ``eight_bits`` activations has it:
    beside those it costs tenths of a decibel (measured on the demo model, docs/profile.md).
    """
    kind = device.partition(".")[0]
    if kind == "CPU":
        if amx and "BF16" in capabilities:
            return PrecisionDefault(precision="bf16", why="its AMX units compute in it")
        if fast_bf16 and eight_bits and component in _NARROW and "BF16" in capabilities:
            return PrecisionDefault(precision="bf16", why="it is faster here, beside 8 bits")
        if fast_bf16:
            return PrecisionDefault(precision="f32", why="bf16 is less exact")
        return PrecisionDefault(precision="f32", why="without AMX, bf16 is slower and less exact")
    if kind == "GPU" and "FP16" in capabilities:
        if component in _AUTOENCODERS:
            return PrecisionDefault(
                precision="f16",
                why="with activations scaled down, which f16 would not hold",
                activations_scale=VAE_ACTIVATIONS_SCALE,
            )
        return PrecisionDefault(precision="f16", why="it is twice as fast as f32 on a GPU")
    if kind == "GPU":
        return PrecisionDefault(precision="f32", why="it has no f16")
    return PrecisionDefault(precision=None, why="the device chooses")


def safer(device: str, precision: str | None) -> tuple[str, Precision] | None:
    """Return device and precision that a component falls back to when its numbers are wrong.

    ``precision`` is the one in use; None: not known. f32 on the same device first, then on the CPU;
    None where nothing is safer.
    """
    kind = device.partition(".")[0]
    if kind == "NPU":
        return "CPU", "f32"
    if precision != "f32":
        return device, "f32"
    return None if kind == "CPU" else ("CPU", "f32")


def guidance_mode_for(device: str) -> GuidanceMode:
    """Return how guidance runs its two predictions on ``device``, any name that OpenVINO takes.

    A CPU computes two single runs as fast as a batch of two (13 s against 12 s for Stable Diffusion
    1.5), with half the activations. A GPU is filled better by a batch. AUTO and HETERO go by the
    first device that they name.
    """
    base, _, rest = device.strip().upper().partition(":")
    first = rest.split(",")[0].strip() if base in ("AUTO", "HETERO") else base
    return "batch" if first.partition(".")[0] == "GPU" else "sequential"
