"""At the same bytes, choosing for each layer keeps more than one scheme for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from equal_bytes import compare_at_equal_bytes
from openvino import opset13 as ops

from sdvino.text.tokenizer import ClipTokenizer
from tests.compress import nets
from tests.conftest import SHAPES, SHAPES_SOURCE


def two_linears() -> ov.Model:
    """A linear with channels of many sizes, and one that hardly counts."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(0.1, 1.0, 64, dtype=np.float32)[:, None]
    x = nets.parameter([1, 8, 64], "sample")
    weights = [sizes * rng.standard_normal((64, 64), dtype=np.float32), np.eye(64, dtype="f4")]
    weights[1] += rng.standard_normal((64, 64), dtype=np.float32)
    y = ops.matmul(x, ops.constant(weights[0]), False, True)
    z = ops.matmul(y, ops.constant(weights[1]), False, True)
    return ov.Model([ops.add(y, ops.multiply(z, ops.constant(np.float32(0.001))))], [x], "two")


def test_channels_of_many_sizes_are_kept_better_by_layer(tmp_path: Path) -> None:
    ov.save_model(two_linears(), tmp_path / "unet.xml", compress_to_fp16=True)
    rng = np.random.default_rng(1)
    seen, unseen = (
        [{"sample": rng.standard_normal((1, 8, 64), dtype=np.float32)} for _ in range(2)]
        for _ in range(2)
    )
    found = compare_at_equal_bytes("unet", tmp_path / "unet.xml", seen, unseen)
    assert found.local_bytes <= found.global_bytes < 0.6 * found.half_bytes
    assert 0 < found.local_error < found.global_error
    assert found.margin == 1 - found.local_error / found.global_error > 0.3
    assert f"{found.margin:.0%} less" in str(found)


@pytest.fixture(scope="module")
def demo_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's UNet in half precision, from its source weights."""
    from sdvino.convert.export import export_component
    from sdvino.convert.open_source import open_source

    folder = tmp_path_factory.mktemp("demo")
    export_component(open_source(SHAPES_SOURCE, folder / "work"), "unet", folder / "unet")
    return folder / "unet" / "openvino_model.xml"


def inputs(prompts: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Noise at all timesteps, with the text states of the bundled demo model."""
    tokenizer = ClipTokenizer.from_folder(SHAPES / "tokenizer", 77)
    encoder = ov.Core().compile_model(SHAPES / "text_encoder" / "openvino_model.xml", "CPU")
    rng = np.random.default_rng(seed)
    return [
        {
            "sample": rng.standard_normal((1, 4, 16, 16), dtype=np.float32),
            "timestep": np.array([timestep]),
            "encoder_hidden_states": encoder({"input_ids": tokenizer.encode(prompt).ids})[0],
        }
        for prompt in prompts
        for timestep in (981, 781, 581, 381)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_demo_s_unet_loses_less_than_half_by_layer(demo_unet: Path) -> None:
    seen = inputs(("a red circle on a blue background", "a small green star"), 0)
    unseen = inputs(("a big purple ring on a white background",), 1)
    found = compare_at_equal_bytes("unet", demo_unet, seen, unseen, groups=8)
    # Measured with every other layer by itself, on the pipeline's own inputs: 1.68 and 0.22 %.
    assert found.margin > 0.5
    assert found.local_bytes <= found.global_bytes
