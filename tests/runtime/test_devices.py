from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov

from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.devices import describe_devices, describe_machine


class RecordedCore:
    """Answers as an ov.Core did elsewhere; what is not recorded raises as OpenVINO does."""

    def __init__(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        self.devices = devices
        self.available_devices = list(devices)

    def get_property(self, device: str, name: str) -> Any:
        if name == "SUPPORTED_PROPERTIES":
            return dict.fromkeys(self.devices[device], "RO")
        value = self.devices[device].get(name)
        if value is None:
            raise RuntimeError(f"Exception from src/core.cpp:1:\n[GPU] {name} failed\n")
        return value


LAPTOP = RecordedCore(
    {
        "CPU": {
            "FULL_DEVICE_NAME": "13th Gen Intel(R) Core(TM) i5-1335U",
            "OPTIMIZATION_CAPABILITIES": ["FP32", "INT8", "BIN", "EXPORT_IMPORT"],
        },
        "GPU": {
            "FULL_DEVICE_NAME": "Intel(R) Arc(TM) 140V GPU (iGPU)",
            "OPTIMIZATION_CAPABILITIES": ["FP32", "BIN", "FP16", "INT8", "GPU_HW_MATMUL"],
            "DEVICE_TYPE": "Type.INTEGRATED",
            "GPU_EXECUTION_UNITS_COUNT": 64,
            "GPU_DEVICE_TOTAL_MEM_SIZE": 17_000_000_000,
            "GPU_UARCH_VERSION": None,
        },
        "NPU": {},
    }
)


def test_a_laptop_with_a_gpu_and_a_broken_npu() -> None:
    cpu, gpu, npu = describe_devices(LAPTOP)
    assert cpu.precisions == ("f32", "int8")
    assert {"cores", "threads"} <= set(cpu.facts)
    assert gpu.full_name == "Intel(R) Arc(TM) 140V GPU (iGPU)"
    assert gpu.precisions == ("f32", "f16", "int8")
    assert gpu.facts == {
        "type": "integrated",
        "execution units": "64",
        "memory it can reach": "17.0 GB",
        "matrix units": "yes (XMX)",
    }
    assert npu.problem is not None
    assert "failed" in npu.problem


def test_this_machine() -> None:
    machine = describe_machine()
    assert machine.openvino == ov.get_version()
    (cpu,) = (device for device in machine.devices if device.device == "CPU")
    assert cpu.problem is None
    assert "f32" in cpu.precisions
    assert machine.memory.total is not None


def test_the_facts_that_properties_are_made_from() -> None:
    facts = device_facts(shared_core(), "CPU")
    assert {"NUM_STREAMS", "INFERENCE_PRECISION_HINT"} <= facts.supported
    assert "FP32" in facts.capabilities
    assert shared_core() is shared_core()
