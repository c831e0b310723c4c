"""Defaults over machines recorded from their files in /sys and /proc."""

from __future__ import annotations

from typing import Any

import pytest

from sdvino.runtime.defaults import cpu_defaults, default_precision, safer
from sdvino.runtime.topology import Cores, CpuReport, linux_cpu
from tests.runtime.test_topology import CPU, I5_1335U, N100, ULTRA_155H, XEON, sysfs

# Core i7-1260P: 4 performance cores of two threads, 8 efficient ones.
I7_1260P = sysfs(
    [f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(8)] + [str(n) for n in range(8, 16)],
    cpu_core="0-7",
    cpu_atom="8-15",
)
# Two sockets of 16 cores, two threads each, siblings far apart.
DUAL_SOCKET = sysfs([f"{n},{n + 32}" for n in range(32)] * 2, flags="avx2 avx512f")
for number in range(64):
    name = f"{CPU}/cpu{number}/topology/physical_package_id"
    DUAL_SOCKET[name] = f"{number % 32 // 16}\n"
V1_QUOTA = {
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
V2_QUOTA = {"/sys/fs/cgroup/cpu.max": "250000 100000\n"}


@pytest.mark.parametrize(
    ("files", "affinity", "threads", "core_type"),
    [
        (I7_1260P, range(16), 4, "performance"),
        (ULTRA_155H, range(22), 6, "performance"),
        # Two fast cores beside eight: all ten.
        (I5_1335U, range(12), 10, "any"),
        (N100, range(4), 4, None),
        (XEON, range(16), 8, None),
        (DUAL_SOCKET, range(64), 16, None),
        # A process kept on one socket has all of that one.
        (DUAL_SOCKET, [*range(16), *range(32, 48)], 16, None),
        # Four processors that are two cores.
        (XEON, [0, 8, 1, 9], 2, None),
        # A hybrid laptop where the process may use the efficient cores alone, or one fast one.
        (I7_1260P, range(8, 16), 8, None),
        (I7_1260P, [0, 1], 1, None),
        (ULTRA_155H, [20, 21], 2, None),
        # Containers: more processors are seen than granted.
        ({**XEON, **V2_QUOTA}, range(16), 3, None),
        ({**XEON, **V1_QUOTA}, range(16), 3, None),
        ({**I7_1260P, **V2_QUOTA}, range(16), 3, "performance"),
        ({**N100, "/sys/fs/cgroup/cpu.max": "max 100000\n"}, range(4), 4, None),
    ],
)
def test_threads_and_cores(
    files: dict[str, str], affinity: Any, threads: int, core_type: str | None
) -> None:
    cpus = frozenset(affinity)
    found = cpu_defaults(linux_cpu(files, usable=len(cpus), affinity=cpus))
    assert (found.num_threads, found.core_type) == (threads, core_type)
    assert found.why


def test_sockets_and_cores_of_a_process() -> None:
    assert linux_cpu(DUAL_SOCKET, usable=64).sockets == 2
    one = linux_cpu(DUAL_SOCKET, usable=16, affinity=frozenset(range(16)))
    assert (one.sockets, one.cores, one.performance_cores) == (1, Cores(16), 32)


@pytest.mark.parametrize(
    ("core_type", "threads"), [("any", 12), ("performance", 4), ("efficient", 8)]
)
def test_a_core_type_that_was_asked_for(core_type: Any, threads: int) -> None:
    cpu = linux_cpu(I7_1260P, usable=16)
    found = cpu_defaults(cpu, core_type=core_type)
    assert (found.num_threads, found.core_type) == (threads, core_type)


def test_throughput_is_openvino_s_to_place_within_the_quota() -> None:
    cpu = linux_cpu(I7_1260P, usable=16)
    assert cpu_defaults(cpu, performance_hint="throughput").num_threads is None
    limited = linux_cpu({**I7_1260P, **V2_QUOTA}, usable=16)
    assert cpu_defaults(limited, performance_hint="throughput").num_threads == 3


def test_nothing_known_of_the_machine_is_one_thread_to_a_processor() -> None:
    assert cpu_defaults(CpuReport(performance_cores=3)).num_threads == 3


@pytest.mark.parametrize(
    ("device", "component", "capabilities", "amx", "precision", "scale"),
    [
        ("CPU", "unet", {"FP32", "INT8"}, False, "f32", None),
        # bf16 instructions without AMX: OpenVINO would choose bf16, which is slower.
        ("CPU", "unet", {"FP32", "BF16"}, False, "f32", None),
        ("CPU", "unet", {"FP32", "BF16", "FP16"}, True, "bf16", None),
        ("CPU", "vae_decoder", {"FP32", "BF16"}, False, "f32", None),
        ("GPU", "unet", {"FP32", "FP16"}, False, "f16", None),
        ("GPU.1", "vae_decoder", {"FP32", "FP16"}, False, "f16", 128.0),
        ("GPU", "unet", {"FP32"}, False, "f32", None),
        ("NPU", "unet", {"FP16"}, False, None, None),
    ],
)
def test_precisions(
    device: str,
    component: str,
    capabilities: set[str],
    amx: bool,
    precision: str | None,
    scale: float | None,
) -> None:
    found = default_precision(device, component, capabilities, amx=amx)
    assert (found.precision, found.activations_scale) == (precision, scale)


@pytest.mark.parametrize(
    ("component", "fast", "eight_bits", "precision"),
    [
        ("unet", True, True, "bf16"),
        ("vae_decoder", True, True, "bf16"),
        ("tiny_vae", True, True, "bf16"),
        # Nothing hides what bf16 rounds off, or it decides what the picture shows.
        ("unet", True, False, "f32"),
        ("text_encoder", True, True, "f32"),
        ("unet", False, True, "f32"),
    ],
)
def test_where_bf16_is_fast_it_goes_with_8_bits(
    component: str, fast: bool, eight_bits: bool, precision: str
) -> None:
    found = default_precision(
        "CPU", component, {"FP32", "BF16"}, fast_bf16=fast, eight_bits=eight_bits
    )
    assert found.precision == precision


@pytest.mark.parametrize(
    ("device", "precision", "place"),
    [
        ("CPU", "bf16", ("CPU", "f32")),
        ("CPU", "f32", None),
        ("GPU", "f16", ("GPU", "f32")),
        ("GPU", None, ("GPU", "f32")),
        ("GPU", "f32", ("CPU", "f32")),
        ("NPU", None, ("CPU", "f32")),
        ("AUTO", "f32", ("CPU", "f32")),
    ],
)
def test_safer_places(device: str, precision: str | None, place: tuple[str, str] | None) -> None:
    assert safer(device, precision) == place
