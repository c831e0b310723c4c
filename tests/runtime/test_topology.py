from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.runtime.topology import (
    CpuReport,
    cgroup_quota,
    cpu_class,
    linux_cpu,
    parse_cpu_list,
    read_cpu,
    windows_cpu,
    within_limit,
)

CPU = "/sys/devices/system/cpu"
LAPTOP_FLAGS = "fpu vme avx avx2 fma avx_vnni sha_ni"


def sysfs(siblings: list[str], *, flags: str = LAPTOP_FLAGS, **core_types: str) -> dict[str, str]:
    """The files of a machine: the sibling list of each processor, and the core types' lists."""
    files = {f"{CPU}/online": f"0-{len(siblings) - 1}\n", "/proc/cpuinfo": f"flags\t\t: {flags}\n"}
    for cpu, text in enumerate(siblings):
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = f"{text}\n"
    for kind, cpus in core_types.items():
        files[f"/sys/devices/{kind}/cpus"] = f"{cpus}\n"
    return files


# Core i5-1335U: 2 performance cores of two threads, 8 efficient ones.
I5_1335U = sysfs(
    ["0-1", "0-1", "2-3", "2-3", *(str(n) for n in range(4, 12))], cpu_core="0-3", cpu_atom="4-11"
)
# Core Ultra 7 155H: 6 performance, 8 efficient, 2 low-power efficient (among cpu_atom too).
ULTRA_155H = sysfs(
    [f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(12)] + [str(n) for n in range(12, 22)],
    cpu_core="0-11",
    cpu_atom="12-21",
    cpu_lowpower="20-21",
)
# N100: efficient cores only; the kernel names no types then.
N100 = sysfs([str(n) for n in range(4)])
# Xeon with hyper-threading, siblings far apart, AMX.
XEON = sysfs(
    [f"{n},{n + 8}" for n in range(8)] * 2,
    flags="avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8",
)


def test_a_hybrid_laptop() -> None:
    cpu = linux_cpu(I5_1335U, usable=12)
    assert (cpu.performance_cores, cpu.efficient_cores, cpu.low_power_cores) == (2, 8, 0)
    assert (cpu.threads, cpu.usable, cpu.quota) == (12, 12, None)
    assert cpu.isa == ("AVX2", "AVX-VNNI")


def test_three_types_of_cores() -> None:
    cpu = linux_cpu(ULTRA_155H, usable=22)
    assert (cpu.performance_cores, cpu.efficient_cores, cpu.low_power_cores) == (6, 8, 2)


def test_one_type_of_cores() -> None:
    cpu = linux_cpu(N100, usable=4)
    assert (cpu.performance_cores, cpu.efficient_cores, cpu.threads) == (4, 0, 4)


def test_a_server() -> None:
    cpu = linux_cpu(XEON, usable=4)
    assert (cpu.performance_cores, cpu.threads, cpu.usable) == (8, 16, 4)
    assert {"AMX-BF16", "AMX-INT8", "AVX512-VNNI"} <= set(cpu.isa)
    assert "AMX-FP16" not in cpu.isa


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"/sys/fs/cgroup/cpu.max": "5 0\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share(files: dict[str, str], quota: int | None) -> None:
    assert cgroup_quota(files) == quota
    assert linux_cpu({**XEON, **files}, usable=16).quota == quota


def test_next_to_nothing_can_be_read() -> None:
    cpu = linux_cpu({}, usable=3)
    assert (cpu.performance_cores, cpu.threads, cpu.usable) == (3, 3, 3)
    assert cpu.flags == frozenset()
    assert cpu.isa == ()


def test_a_processor_that_is_switched_off_counts_nowhere() -> None:
    files = {**N100, f"{CPU}/online": "0,2-3\n"}
    assert linux_cpu(files, usable=4) == linux_cpu(files, usable=3)
    assert linux_cpu(files, usable=4).performance_cores == 3


def test_an_arm_processor() -> None:
    files = {**N100, "/proc/cpuinfo": "processor: 0\nFeatures\t: fp asimd asimddp\n"}
    assert linux_cpu(files, usable=4).isa == ("NEON", "dot product")


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists(cpus: set[int]) -> None:
    assert parse_cpu_list(",".join(map(str, sorted(cpus))) + "\n") == cpus


def test_cpu_ranges() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    for wrong in ("3-1", "a", "0-99999999", "1-2-3"):
        with pytest.raises(ValueError):  # noqa: PT011 - int() words some of them
            parse_cpu_list(wrong)


def record(efficiency: int, mask: int) -> bytes:
    """One SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX of a core, as Windows gives it."""
    return struct.pack("<IIBB20xHQH6x", 0, 48, 0, efficiency, 1, mask, 0)


def test_windows_on_a_hybrid_laptop() -> None:
    records = b"".join(
        [record(1, 0b11), record(1, 0b1100), *(record(0, 1 << n) for n in range(4, 12))]
    )
    cpu = windows_cpu(records, threads=12, usable=12, features=frozenset({"avx2"}))
    assert (cpu.performance_cores, cpu.efficient_cores, cpu.threads) == (2, 8, 12)
    assert cpu.isa == ("AVX2",)


def test_windows_with_one_and_with_three_types_of_cores() -> None:
    plain = windows_cpu(record(0, 0b11) * 4, threads=8, usable=8, features=frozenset())
    assert (plain.performance_cores, plain.efficient_cores, plain.threads) == (4, 0, 8)
    three = b"".join([record(2, 0b11), record(1, 4), record(1, 8), record(0, 16)])
    cpu = windows_cpu(three, threads=5, usable=5, features=frozenset())
    assert (cpu.performance_cores, cpu.efficient_cores, cpu.low_power_cores) == (1, 2, 1)


@given(st.binary(max_size=200))
def test_whatever_windows_answers(records: bytes) -> None:
    cpu = windows_cpu(records, threads=6, usable=6, features=frozenset())
    assert cpu.performance_cores >= 1


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("AVX2", ("AVX2",)),
        ("avx2_vnni", ("AVX2", "AVX-VNNI")),
        ("AVX512_CORE", ("AVX2", "AVX-512")),
        ("AVX512_CORE_VNNI", ("AVX2", "AVX-512", "AVX512-VNNI")),
    ],
)
def test_onednn_is_kept_to_an_instruction_set(limit: str, left: tuple[str, ...]) -> None:
    flags = [
        "sse4_1",
        "avx",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
    ]
    cpu = within_limit(CpuReport(performance_cores=8, flags=frozenset(flags)), limit)
    assert cpu.isa == left
    assert cpu.limited
    assert "sse4_1" in cpu.flags


def test_a_limit_that_takes_nothing_is_none() -> None:
    cpu = CpuReport(performance_cores=8, flags=frozenset({"avx", "avx2"}))
    for limit in ("", "DEFAULT", "AVX2", "AVX512_CORE", "AVX512_CORE_AMX", "nonsense"):
        assert not within_limit(cpu, limit).limited
        assert within_limit(cpu, limit).isa == ("AVX2",)


def test_this_machine_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert set(read_cpu().isa) <= {"AVX2", "NEON", "dot product"}


def test_the_class_of_a_processor() -> None:
    assert cpu_class(("AVX2", "AVX-512", "AVX512-VNNI", "AMX-INT8")) == "amx"
    assert cpu_class(("AVX2", "AVX-VNNI")) == "avx2-vnni"
    assert cpu_class(("NEON", "dot product")) == "arm"
    assert cpu_class(()) == "avx2"


def test_this_machine() -> None:
    cpu = read_cpu()
    assert isinstance(cpu, CpuReport)
    assert 1 <= cpu.usable <= cpu.threads
    assert 1 <= cpu.performance_cores + cpu.efficient_cores + cpu.low_power_cores <= cpu.threads
