"""What the int8 recipe does to UNets that are told more than text, in miniature."""

from __future__ import annotations

from pathlib import Path

import int8_coverage
import numpy as np
import openvino as ov
import pytest

from sdvino.compress.fragile import is_fragile
from sdvino.compress.parts import choose_ends
from sdvino.compress.stepwise import Evaluator
from sdvino.folder.index import ModelFolder
from tests.convert.miniatures import Miniatures

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]
ARCHITECTURES = ("tiny-sdxl", "tiny-lcm")
#: What a family's UNet is told beside text, which goes through float layers.
TOLD = {"tiny-sdxl": "add_embedding", "tiny-lcm": "cond_proj"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_predicts_what_float_predicts(arch: str, miniatures: Miniatures) -> None:
    samples = miniatures.inputs(arch).unet
    assert len(samples) >= 6
    results = []
    for folder in (miniatures.exported(arch), miniatures.folder(arch, "int8")):
        model = ov.Core().read_model(folder / "unet" / "openvino_model.xml")
        run = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results.append(np.array([run(sample)[0] for sample in samples]))
    expected, found = results
    assert np.linalg.norm(found - expected) <= 0.2 * np.linalg.norm(expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_runs_in_8_bits_but_for_what_is_fragile(arch: str, miniatures: Miniatures) -> None:
    folder = ModelFolder.open(miniatures.folder(arch, "int8"))
    unet = next(iter(int8_coverage.measure_folder(folder)))
    assert unet.component == "unet"
    assert unet.enough, [layer.name for layer in unet.left_in_float]
    told = [layer for layer in unet.layers if TOLD[arch] in layer.name]
    assert told
    for layer in told:
        assert is_fragile("unet", layer.name)
        assert not layer.planned


def test_the_unet_of_a_large_model_comes_apart(miniatures: Miniatures, tmp_path: Path) -> None:
    """Its blocks share shapes across the whole: that must not hold them in one part."""
    samples = miniatures.inputs("tiny-sdxl").unet[:2]
    model = ov.Core().read_model(miniatures.exported("tiny-sdxl") / "unet" / "openvino_model.xml")
    run = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = [run(sample)[0] for sample in samples]
    ends = choose_ends(model, samples[0], 2_500_000)  # of 21 million
    assert len(ends) >= 9
    assert {"down_blocks", "mid_block", "up_blocks"} <= {name.split(".")[0] for name in ends}
    found = Evaluator(model, ends).evaluate(samples, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
