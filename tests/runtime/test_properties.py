from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdvino.errors import DeviceError
from sdvino.runtime.properties import (
    DeviceFacts,
    compile_properties,
    convolves_linears,
    hardware_of,
    normalize_device,
    norms_by_channel,
    precision_in,
)
from sdvino.runtime.topology import CpuReport, within_limit
from sdvino.settings import DeviceSettings, LinearKernel, Precision

CPU = DeviceFacts(
    supported=frozenset(
        {
            "PERFORMANCE_HINT",
            "NUM_STREAMS",
            "INFERENCE_NUM_THREADS",
            "SCHEDULING_CORE_TYPE",
            "ENABLE_CPU_PINNING",
            "ENABLE_HYPER_THREADING",
            "INFERENCE_PRECISION_HINT",
        }
    ),
    capabilities=frozenset({"FP32", "INT8", "BIN", "EXPORT_IMPORT"}),
)
SERVER = replace(CPU, capabilities=CPU.capabilities | {"BF16", "FP16"}, amx=True)
GPU = DeviceFacts(
    supported=frozenset({"PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_PRECISION_HINT"}),
    capabilities=frozenset({"FP32", "FP16", "INT8"}),
)
NPU = DeviceFacts(
    supported=frozenset({"PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT"}),
    capabilities=frozenset({"FP16", "INT8"}),
)
LAPTOP = ("CPU", "GPU", "NPU")


def test_a_cpu_without_amx_runs_one_stream_in_f32() -> None:
    assert compile_properties(DeviceSettings(), "CPU", {"CPU": CPU}) == {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }


def test_amd_s_bf16_goes_with_8_bits() -> None:
    flags = frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16"})
    cpu = CpuReport(performance_cores=2, threads=2, usable=2, flags=flags, vendor="AuthenticAMD")
    has = CPU.capabilities | {"BF16"}
    cases: tuple[tuple[CpuReport, bool, Precision | None, str], ...] = (
        (cpu, True, None, "bf16"),
        (cpu, True, "f32", "f32"),
        (cpu, False, None, "f32"),
        (replace(cpu, vendor="GenuineIntel"), True, None, "f32"),
        (within_limit(cpu, "AVX2"), True, None, "f32"),
    )
    for report, eight_bits, asked, expected in cases:
        facts = {"CPU": replace(CPU, cpu=report, capabilities=has)}
        settings = DeviceSettings(precision=asked)
        found = compile_properties(settings, "CPU", facts, "unet", eight_bits=eight_bits)
        assert found["INFERENCE_PRECISION_HINT"] == expected


def test_a_cpu_with_amx_runs_in_bf16() -> None:
    properties = compile_properties(DeviceSettings(), "CPU", {"CPU": SERVER})
    assert properties["INFERENCE_PRECISION_HINT"] == "bf16"
    properties = compile_properties(DeviceSettings(precision="f32"), "CPU", {"CPU": SERVER})
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"


def test_every_cpu_setting_has_its_property() -> None:
    settings = DeviceSettings(
        num_threads=6,
        num_streams=2,
        performance_hint="throughput",
        core_type="performance",
        pinning=False,
        hyper_threading=True,
        precision="f32",
    )
    assert compile_properties(settings, "CPU", {"CPU": CPU}) == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": 2,
        "INFERENCE_NUM_THREADS": 6,
        "SCHEDULING_CORE_TYPE": "PCORE_ONLY",
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }


def test_throughput_leaves_the_streams_to_the_device() -> None:
    settings = DeviceSettings(performance_hint="throughput")
    assert "NUM_STREAMS" not in compile_properties(settings, "CPU", {"CPU": CPU})


def test_a_containers_quota_limits_the_threads_unless_told() -> None:
    report = CpuReport(performance_cores=8, threads=16, usable=16, quota=2)
    limited = {"CPU": replace(CPU, cpu=report)}
    assert compile_properties(DeviceSettings(), "CPU", limited)["INFERENCE_NUM_THREADS"] == 2
    told = DeviceSettings(num_threads=5)
    assert compile_properties(told, "CPU", limited)["INFERENCE_NUM_THREADS"] == 5


def test_below_its_instruction_set_a_processor_quantizes_nothing_as_it_goes() -> None:
    name = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
    cpu = replace(CPU, supported=CPU.supported | {name})
    for limited in (True, False):
        report = CpuReport(performance_cores=2, threads=2, usable=2, limited=limited)
        found = compile_properties(DeviceSettings(), "CPU", {"CPU": replace(cpu, cpu=report)})
        assert found.get(name) == (0 if limited else None)


def test_a_hybrid_chip_runs_on_its_performance_cores() -> None:
    report = CpuReport(performance_cores=4, efficient_cores=8, threads=16, usable=16)
    laptop = {"CPU": replace(CPU, cpu=report)}
    properties = compile_properties(DeviceSettings(), "CPU", laptop)
    assert properties["SCHEDULING_CORE_TYPE"] == "PCORE_ONLY"
    assert properties["INFERENCE_NUM_THREADS"] == 4
    # Twelve threads, as asked, do not fit on four cores.
    properties = compile_properties(DeviceSettings(num_threads=12), "CPU", laptop)
    assert properties["INFERENCE_NUM_THREADS"] == 12
    assert "SCHEDULING_CORE_TYPE" not in properties
    properties = compile_properties(DeviceSettings(core_type="efficient"), "CPU", laptop)
    assert properties["SCHEDULING_CORE_TYPE"] == "ECORE_ONLY"
    assert properties["INFERENCE_NUM_THREADS"] == 8
    # How many threads two to a core are, the device knows.
    both = compile_properties(DeviceSettings(hyper_threading=True), "CPU", laptop)
    assert "INFERENCE_NUM_THREADS" not in both
    # An older plugin without core types is left to its own rule.
    old = {"CPU": replace(laptop["CPU"], supported=CPU.supported - {"SCHEDULING_CORE_TYPE"})}
    assert "SCHEDULING_CORE_TYPE" not in compile_properties(DeviceSettings(), "CPU", old)


def test_a_gpu_scales_the_autoencoder_s_activations_and_feeds_it_from_a_fast_core() -> None:
    more = {"ACTIVATIONS_SCALE_FACTOR", "GPU_HOST_TASK_PRIORITY"}
    gpu = {"GPU": replace(GPU, supported=GPU.supported | more)}
    vae = compile_properties(DeviceSettings(device="GPU"), "GPU", gpu, "vae_decoder")
    assert vae["ACTIVATIONS_SCALE_FACTOR"] == 128.0
    assert vae["GPU_HOST_TASK_PRIORITY"] == "HIGH"
    exact = DeviceSettings(device="GPU", precision="f32", core_type="efficient")
    vae = compile_properties(exact, "GPU", gpu, "vae_decoder")
    assert "ACTIVATIONS_SCALE_FACTOR" not in vae
    assert vae["GPU_HOST_TASK_PRIORITY"] == "LOW"
    unet = compile_properties(DeviceSettings(device="GPU"), "GPU", gpu, "unet")
    assert "ACTIVATIONS_SCALE_FACTOR" not in unet


@pytest.mark.parametrize(
    ("properties", "precision"),
    [
        ({"INFERENCE_PRECISION_HINT": "f16"}, "f16"),
        ({}, None),
        ({"DEVICE_PROPERTIES": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}}, "f32"),
        (
            {
                "DEVICE_PROPERTIES": {
                    "CPU": {"INFERENCE_PRECISION_HINT": "f32"},
                    "GPU": {"INFERENCE_PRECISION_HINT": "f16"},
                }
            },
            None,
        ),
    ],
)
def test_the_precision_asked_for(properties: dict[str, Any], precision: str | None) -> None:
    assert precision_in(properties) == precision


@pytest.mark.parametrize(
    ("asked", "isa", "hardware", "expected"),
    [
        (None, ("avx2",), ("CPU",), True),
        (None, ("avx2", "avx_vnni"), ("CPU",), False),
        ("matmul", ("avx2",), ("CPU",), False),
        ("convolution", ("avx2", "avx_vnni"), ("CPU",), True),
        (None, ("avx2",), ("GPU", "CPU"), False),
        ("convolution", ("avx2",), ("GPU",), False),
        ("convolution", ("avx2",), (), False),
    ],
)
def test_linear_layers_are_convolutions_on_a_cpu_alone(
    asked: LinearKernel | None, isa: tuple[str, ...], hardware: tuple[str, ...], expected: bool
) -> None:
    cpu = CpuReport(performance_cores=4, flags=frozenset(isa))
    known = {"CPU": replace(CPU, cpu=cpu), "GPU": GPU}
    facts = {name: known[name] for name in hardware}
    assert convolves_linears(DeviceSettings(linear_kernel=asked), facts) == expected


@pytest.mark.parametrize(
    ("component", "precision", "isa", "hardware", "expected"),
    [
        ("vae_decoder", "f32", ("avx2",), ("CPU",), True),
        ("vae_encoder", "f32", ("avx2",), ("CPU",), True),
        ("unet", "f32", ("avx2",), ("CPU",), False),
        ("vae_decoder", "bf16", ("avx2",), ("CPU",), False),
        ("vae_decoder", None, ("avx2",), ("CPU",), False),
        ("vae_decoder", "f32", ("avx2", "avx_vnni"), ("CPU",), False),
        ("vae_decoder", "f32", ("avx2",), ("GPU", "CPU"), False),
        ("vae_decoder", "f32", ("avx2",), (), False),
    ],
)
def test_group_norms_are_of_channels_in_an_autoencoder_on_a_cpu(
    component: str,
    precision: str | None,
    isa: tuple[str, ...],
    hardware: tuple[str, ...],
    expected: bool,
) -> None:
    cpu = CpuReport(performance_cores=4, flags=frozenset(isa))
    known = {"CPU": replace(CPU, cpu=cpu), "GPU": GPU}
    facts = {name: known[name] for name in hardware}
    assert norms_by_channel(component, precision, facts) == expected


def test_an_unknown_cpu_runs_what_was_exported() -> None:
    assert not convolves_linears(DeviceSettings(), {"CPU": CPU})
    assert not norms_by_channel("vae_decoder", "f32", {"CPU": CPU})


def test_a_gpu_runs_f16_and_has_no_threads() -> None:
    settings = DeviceSettings(num_threads=4, core_type="efficient", pinning=True)
    assert compile_properties(settings, "GPU.1", {"GPU.1": GPU}) == {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f16",
    }


def test_an_npu_gets_the_hint_alone() -> None:
    settings = DeviceSettings(num_threads=4, num_streams=2)
    assert compile_properties(settings, "NPU", {"NPU": NPU}) == {"PERFORMANCE_HINT": "LATENCY"}


@pytest.mark.parametrize(
    ("device", "facts", "precision", "words"),
    [
        ("CPU", CPU, "bf16", "CPU does not compute in bf16; it has: f32"),
        ("CPU", CPU, "f16", "CPU does not compute in f16"),
        ("GPU", GPU, "bf16", "it has: f32, f16"),
        ("NPU", NPU, "f32", "NPU does not compute in f32"),
    ],
)
def test_a_precision_that_the_device_lacks(
    device: str, facts: DeviceFacts, precision: Any, words: str
) -> None:
    with pytest.raises(DeviceError, match=words):
        compile_properties(DeviceSettings(precision=precision), device, {device: facts})


def test_a_property_that_the_device_does_not_take() -> None:
    old = replace(CPU, supported=CPU.supported - {"SCHEDULING_CORE_TYPE"})
    compile_properties(DeviceSettings(), "CPU", {"CPU": old})
    with pytest.raises(DeviceError, match=r"CPU does not take --core-type"):
        compile_properties(DeviceSettings(core_type="any"), "CPU", {"CPU": old})


def test_auto_passes_each_device_its_own() -> None:
    settings = DeviceSettings(num_threads=3)
    properties = compile_properties(settings, "AUTO:GPU,CPU", {"GPU": GPU, "CPU": CPU})
    assert properties["PERFORMANCE_HINT"] == "LATENCY"
    assert properties["ENABLE_STARTUP_FALLBACK"] is False
    assert properties["DEVICE_PROPERTIES"] == {
        "GPU": compile_properties(settings, "GPU", {"GPU": GPU}),
        "CPU": compile_properties(settings, "CPU", {"CPU": CPU}),
    }


def test_hetero_takes_nothing_but_its_devices_properties() -> None:
    properties = compile_properties(DeviceSettings(), "HETERO:GPU,CPU", {"GPU": GPU, "CPU": CPU})
    assert list(properties) == ["DEVICE_PROPERTIES"]


@pytest.mark.parametrize(
    ("asked", "available", "name", "hardware"),
    [
        ("cpu", LAPTOP, "CPU", ["CPU"]),
        (" GPU ", LAPTOP, "GPU", ["GPU"]),
        ("gpu.0", LAPTOP, "GPU.0", ["GPU.0"]),
        ("GPU", ("CPU", "GPU.0", "GPU.1"), "GPU", ["GPU"]),
        ("GPU.1", ("CPU", "GPU.0", "GPU.1"), "GPU.1", ["GPU.1"]),
        ("auto", LAPTOP, "AUTO", ["CPU", "GPU", "NPU"]),
        ("auto:gpu, cpu", LAPTOP, "AUTO:GPU,CPU", ["GPU", "CPU"]),
        ("AUTO:-NPU", LAPTOP, "AUTO:-NPU", ["CPU", "GPU"]),
        ("hetero:GPU,CPU", LAPTOP, "HETERO:GPU,CPU", ["GPU", "CPU"]),
    ],
)
def test_names_of_devices(
    asked: str, available: tuple[str, ...], name: str, hardware: list[str]
) -> None:
    assert normalize_device(asked, available) == name
    assert hardware_of(name, available) == hardware


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("TPU", "'TPU'.*available: CPU, GPU, NPU"),
        ("GPU.1", "GPU.1"),
        ("CPU.7", "CPU.7"),
        ("AUTO:TPU", "TPU"),
        ("AUTO:", "empty"),
        ("HETERO", "HETERO:GPU,CPU"),
        ("HETERO:-CPU", "-CPU"),
        ("MULTI:CPU,GPU", "MULTI"),
    ],
)
def test_devices_that_are_not_here(asked: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        normalize_device(asked, LAPTOP)
