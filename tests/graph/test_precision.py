"""What bf16 costs beside 8 bits, and that a component has it by itself only where it is fast."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest

from sdvino.runtime.component import Component
from sdvino.runtime.core import device_facts, shared_core
from sdvino.settings import DeviceSettings
from tests.conftest import SHAPES
from tests.graph.test_rewrites import Graph

UNET = SHAPES / "unet" / "openvino_model.xml"
TEXT_ENCODER = SHAPES / "text_encoder" / "openvino_model.xml"


@pytest.mark.slow
def test_the_unet_in_bf16_is_no_further_from_the_float_model_than_before() -> None:
    if "BF16" not in device_facts(shared_core(), "CPU").capabilities:
        pytest.skip("this processor has no bf16")
    graph = Graph("int8", UNET, 128)
    compiled = ov.Core().compile_model(graph.read(), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    given = {
        port: next(graph.inputs[name] for name in port.get_names() if name in graph.inputs)
        for port in compiled.inputs
    }
    assert graph.holds(np.array(compiled(given)[0], np.float32))


def test_a_component_computes_in_bf16_by_itself_only_beside_8_bits_where_that_is_fast() -> None:
    facts = device_facts(shared_core(), "CPU")
    expected = "bf16" if facts.amx or facts.fast_bf16 else "f32"

    def prepare(model: ov.Model) -> None:
        model.reshape(
            {"sample": [1, 4, 8, 8], "encoder_hidden_states": [1, 77, 128], "timestep": []}
        )

    off = DeviceSettings(cache=False)
    assert Component("unet", UNET, off, prepare=prepare).precision == expected
    exact = DeviceSettings(cache=False, precision="f32")
    assert Component("unet", UNET, exact, prepare=prepare).precision == "f32"
    # Its activations are floats.
    encoder = Component("text_encoder", TEXT_ENCODER, off)
    assert encoder.precision == ("bf16" if facts.amx else "f32")
