from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.graph.saving import read_ir, save_ir
from sdvino.train.optimum_export import restore_frequencies, sinusoid_frequencies


def embedding(frequencies: np.ndarray) -> ov.Model:
    t = ops.parameter([-1, 1], ov.Type.f32, name="t")
    angle = ops.multiply(t, ops.constant(frequencies.astype(np.float32)[None]))
    return ov.Model([ops.concat([ops.cos(angle), ops.sin(angle)], -1)], [t], "embedding")


def worst_error(xml: Path, frequencies: np.ndarray) -> float:
    run = ov.Core().compile_model(read_ir(xml), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    t = np.arange(1000, dtype=np.float32)[:, None]
    angle = np.arange(1000)[:, None] * frequencies
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    return float(np.abs(run(t)[0] - expected).max())


@pytest.mark.parametrize(("channels", "shift"), [(320, 0.0), (64, 0.0), (64, 1.0)])
def test_frequencies_are_those_of_diffusers(channels: int, shift: float) -> None:
    torch = pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding

    one = torch.tensor([1e-3])
    sines = get_timestep_embedding(one, channels, downscale_freq_shift=shift).numpy()[0]
    np.testing.assert_allclose(
        sines[: channels // 2], np.sin(1e-3 * sinusoid_frequencies(channels, shift)), rtol=1e-5
    )


def test_half_precision_spoils_the_embedding_and_the_table_mends_it(tmp_path: Path) -> None:
    xml = tmp_path / "openvino_model.xml"
    frequencies = sinusoid_frequencies(320, 0.0)
    save_ir(embedding(frequencies), xml)
    assert worst_error(xml, frequencies) > 0.05
    model = read_ir(xml)
    assert restore_frequencies(model, frequencies) == 1
    for _ in range(2):  # and saving it once more, as compression does, spoils nothing
        save_ir(model, xml)
        assert worst_error(xml, frequencies) < 2e-4
        model = read_ir(xml)


def test_another_table_is_left_alone() -> None:
    model = embedding(np.linspace(1, 5, 160))
    before = [op.get_friendly_name() for op in model.get_ordered_ops()]
    assert restore_frequencies(model, sinusoid_frequencies(320, 0.0)) == 0
    assert [op.get_friendly_name() for op in model.get_ordered_ops()] == before
