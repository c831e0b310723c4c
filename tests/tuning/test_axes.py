from __future__ import annotations

from dataclasses import replace

from sdvino.runtime.properties import DeviceFacts, linear_kernel
from sdvino.runtime.topology import CpuReport, linux_cpu
from sdvino.settings import DeviceSettings
from sdvino.tuning.axes import (
    Choice,
    axes,
    cores,
    guidance_modes,
    linear_kernels,
    pinnings,
    places,
)
from sdvino.tuning.search import Candidate
from tests.runtime.test_defaults import DUAL_SOCKET, I7_1260P, V2_QUOTA
from tests.runtime.test_properties import CPU, GPU, SERVER
from tests.runtime.test_topology import N100

START = Choice(DeviceSettings())


def labels(candidates: list[Candidate[Choice]]) -> list[str]:
    return [candidate.label for candidate in candidates]


def core_sets(cpu: CpuReport) -> set[tuple[int | None, str | None, bool | None]]:
    settings = [candidate.settings.settings for candidate in cores(START, cpu)]
    return {(s.num_threads, s.core_type, s.hyper_threading) for s in settings}


def test_every_precision_of_every_device_the_default_first() -> None:
    facts = {"CPU": SERVER, "GPU": GPU}
    found = places("unet", START, facts, ["CPU", "GPU"])
    assert labels(found) == ["CPU, bf16", "CPU, f32", "CPU, f16", "GPU, f16", "GPU, f32"]
    assert found[0].settings.settings.precision == "bf16"
    assert found[3].settings.settings.device == "GPU"


def test_a_laptop_without_more_than_f32_has_nothing_to_choose() -> None:
    assert labels(places("unet", START, {"CPU": CPU}, ["CPU"])) == ["CPU, f32"]


def test_cores_of_a_hybrid_laptop() -> None:
    found = core_sets(linux_cpu(I7_1260P, usable=16))
    assert found == {
        (None, None, None),  # the default: 4 performance cores
        (12, "any", None),
        (8, "efficient", None),
        (11, "any", None),
        (6, "any", None),
        (16, "any", True),
        (8, "performance", True),
    }


def test_cores_of_one_kind() -> None:
    assert core_sets(linux_cpu(N100, usable=4)) == {
        (None, None, None),
        (3, None, None),
        (2, None, None),
    }


def test_both_sockets_are_tried() -> None:
    assert (32, None, None) in core_sets(linux_cpu(DUAL_SOCKET, usable=64))


def test_a_container_s_quota_is_not_exceeded() -> None:
    cpu = linux_cpu({**I7_1260P, **V2_QUOTA}, usable=16)
    assert all(count is None or count <= 3 for count, _, _ in core_sets(cpu))


def test_one_core_leaves_nothing_to_choose() -> None:
    cpu = linux_cpu(I7_1260P, usable=1, affinity=frozenset({0}))
    assert len(cores(START, cpu)) == 1


def test_a_gpu_has_no_cores_and_no_pinning() -> None:
    gpu = Choice(DeviceSettings(device="GPU"))
    assert cores(gpu, linux_cpu(N100, usable=4)) == []
    assert pinnings(gpu, {"CPU": CPU, "GPU": GPU}) == []


def test_pinning_where_the_device_has_it() -> None:
    assert labels(pinnings(START, {"CPU": CPU})) == ["default", "pinned", "not pinned"]
    old: DeviceFacts = replace(CPU, supported=CPU.supported - {"ENABLE_CPU_PINNING"})
    assert pinnings(START, {"CPU": old}) == []


def test_guidance_starts_with_one_after_the_other() -> None:
    assert [c.settings.guidance_mode for c in guidance_modes(START)] == [
        "sequential",
        "batch",
        "streams",
    ]


def test_the_axes_follow_each_other() -> None:
    facts = {"CPU": replace(CPU, cpu=linux_cpu(N100, usable=4))}
    found = axes("unet", facts, ["CPU"])
    assert [axis.name for axis in found] == [
        "device and precision",
        "cores",
        "pinning",
        "linear layers",
    ]
    assert [len(axis.candidates(START)) for axis in found] == [1, 3, 3, 2]


def test_linear_layers_of_the_unet_are_tried_both_ways_the_default_first() -> None:
    laptop = linux_cpu(I7_1260P, usable=16)
    found = linear_kernels("unet", START, laptop)
    default = linear_kernel(laptop.isa)
    assert found[0].settings == START
    assert found[1].settings.settings.linear_kernel not in (None, default)
    assert linear_kernels("vae_decoder", START, laptop) == []
    assert linear_kernels("unet", Choice(DeviceSettings(device="GPU")), laptop) == []
