"""Arrays kept on a device: on the CPU, which needs no such thing, they are plain arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from sdvino.runtime.component import Component
from sdvino.runtime.remote import DeviceArray, keep_on_device
from sdvino.settings import DeviceSettings
from tests.runtime.test_component import INPUTS, expected, prepare
from tests.tiny_folder import make_tiny_folder


class Tensor:
    """What a GPU's context gives."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.data = np.zeros(shape, np.float32)

    def copy_from(self, tensor: ov.Tensor) -> None:
        self.data[...] = tensor.data


class GpuCore:
    """The part of an ov.Core with a GPU that is asked for."""

    def __init__(self, works: bool = True) -> None:
        self.works = works

    def get_default_context(self, device: str) -> Any:
        if not self.works:
            raise RuntimeError("get_default_context is not supported")
        assert device == "GPU"
        return self

    def create_tensor(self, kind: ov.Type, shape: ov.Shape, properties: Any) -> Tensor:
        assert kind == ov.Type.f32
        return Tensor(tuple(shape))


@pytest.mark.parametrize("hardware", [("CPU",), ("NPU",), ("CPU", "GPU"), ()])
def test_elsewhere_inputs_stay_as_they_are(hardware: tuple[str, ...]) -> None:
    assert keep_on_device(hardware, INPUTS, GpuCore()) is INPUTS


def test_the_cpu_of_this_machine_has_no_context() -> None:
    # That is what the interface is for: a plugin without one answers with an error.
    with pytest.raises(RuntimeError):
        ov.Core().get_default_context("CPU")
    assert keep_on_device(("GPU",), INPUTS, GpuCore(works=False)) is INPUTS


def test_what_was_kept_for_a_gpu_is_read_by_the_cpu(tmp_path: Path) -> None:
    ids = np.ones(2, np.int64)
    kept: Any = keep_on_device(("GPU",), {**INPUTS, "ids": ids}, GpuCore())
    assert kept["ids"] is ids
    states = kept["encoder_hidden_states"]
    assert isinstance(states, DeviceArray)
    assert states.shape == (1, 77, 32)
    np.testing.assert_array_equal(states.tensor.data, INPUTS["encoder_hidden_states"])
    # The component moved to the CPU meanwhile.
    folder = make_tiny_folder(tmp_path / "model")
    xml = folder / "unet" / "openvino_model.xml"
    unet = Component("unet", xml, DeviceSettings(), prepare=prepare)
    unet.load()
    del kept["ids"]
    out = unet.infer(kept)["out_sample"]
    np.testing.assert_allclose(out, expected(INPUTS["sample"], 250.5), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_real_gpu_reads_what_it_keeps(tmp_path: Path) -> None:
    if not any(name.startswith("GPU") for name in ov.Core().available_devices):
        pytest.skip("OpenVINO finds no GPU here")
    folder = make_tiny_folder(tmp_path / "model")
    xml = folder / "unet" / "openvino_model.xml"
    unet = Component("unet", xml, DeviceSettings(device="GPU", precision="f32"), prepare=prepare)
    states = {"encoder_hidden_states": INPUTS["encoder_hidden_states"]}
    kept = keep_on_device(unet.hardware, states)
    assert isinstance(kept["encoder_hidden_states"], DeviceArray)
    for _ in range(2):
        out = unet.infer({**INPUTS, **kept})["out_sample"]
        np.testing.assert_allclose(out, expected(INPUTS["sample"], 250.5), rtol=1e-2, atol=1e-2)
