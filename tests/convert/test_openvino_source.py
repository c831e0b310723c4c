from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.convert.open_source import open_source
from sdvino.convert.openvino_source import OpenVinoFolder, copy_component, restore_weights
from sdvino.convert.suggestions import suggestions
from sdvino.errors import RequestError
from sdvino.graph.saving import read_ir
from tests.tiny_folder import make_tiny_folder

RNG = np.random.default_rng(5)


def stored(shape: tuple[int, ...], kind: str, *, zero_point: bool, groups: bool) -> Any:
    """A weight as NNCF's compress_weights leaves it."""
    packed = (shape[0], shape[1] // 8, 8) if groups else shape
    low, high = {"u8": (0, 255), "i8": (-127, 127), "u4": (0, 15), "i4": (-8, 7)}[kind]
    per_scale = (*packed[:-1], 1)
    values = RNG.integers(low, high + 1, packed)
    node = ops.convert(constant(values, kind), "f16")
    if zero_point:
        node = ops.subtract(
            node, ops.convert(constant(RNG.integers(low, high, per_scale), kind), "f16")
        )
    scales = RNG.uniform(0.001, 0.01, per_scale).astype(np.float16)
    node = ops.multiply(node, ops.constant(scales))
    if groups:
        node = ops.reshape(node, np.array(shape, np.int64), special_zero=False)
    return ops.convert(node, "f32")


def constant(values: Any, kind: str) -> Any:
    small = {"u8": np.uint8, "i8": np.int8, "u4": np.uint8, "i4": np.int8}[kind]
    return ops.constant(values.astype(small), dtype=getattr(ov.Type, kind))


def linear(weight: Any, width: int) -> ov.Model:
    x = ops.parameter([-1, width], ov.Type.f32, name="x")
    return ov.Model([ops.result(ops.matmul(x, weight, False, True))], [x], "linear")


def run(model: ov.Model, x: Any) -> Any:
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return ov.Core().compile_model(model, "CPU", properties)(x)[0]


def kinds(model: ov.Model) -> set[str]:
    found = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return {op.get_element_type().get_type_name() for op in found} - {"i64"}


@pytest.mark.parametrize("kind", ["u8", "i8", "u4", "i4"])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_weights_in_fewer_bits_become_half_precision(
    kind: str, zero_point: bool, groups: bool
) -> None:
    model = linear(stored((32, 64), kind, zero_point=zero_point, groups=groups), 64)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    before = run(model, x)
    assert restore_weights(model) == 1
    assert kinds(model) == {"f16"}
    after = run(model, x)
    assert np.linalg.norm(after - before) <= 1e-3 * np.linalg.norm(before)


def test_float_weights_and_other_integers_are_left_alone() -> None:
    model = linear(ops.constant(np.ones((32, 64), np.float32)), 64)
    assert restore_weights(model) == 0
    x = ops.parameter([-1, 64], ov.Type.u8, name="x")
    mask = ops.multiply(ops.convert(x, "f32"), ops.convert(constant(np.ones(64), "u8"), "f32"))
    other = ov.Model([ops.result(mask)], [x], "mask")
    assert restore_weights(other) == 0


def test_a_folder_is_a_source_with_all_that_conversion_asks(tmp_path: Path) -> None:
    path = make_tiny_folder(tmp_path / "tiny")
    folder = open_source(path, tmp_path / "work")
    assert isinstance(folder, OpenVinoFolder)
    assert folder.name == "tiny"
    assert folder.family.name == "sd1"
    assert list(folder.components) == ["text_encoder", "unet", "vae_decoder"]
    assert folder.latent_shape == (4, 16, 16)
    assert folder.prediction_type == "v_prediction"
    assert folder.tokenizers == ("tokenizer",)
    assert folder.bytes_of("unet") > 0
    assert folder.configs["vae"]["scaling_factor"] == 0.18215
    assert suggestions(folder, {})["num_inference_steps"] == 8


def test_float_components_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = OpenVinoFolder.open(make_tiny_folder(tmp_path / "tiny"))
    assert copy_component(folder, "unet", tmp_path / "out") == 0
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (folder.path / "unet" / name).read_bytes()


def test_components_with_8_bit_weights_are_written_in_float(tmp_path: Path) -> None:
    path = make_tiny_folder(tmp_path / "tiny")
    shutil.rmtree(path / "vae_encoder", ignore_errors=True)
    model = linear(stored((32, 64), "u8", zero_point=True, groups=False), 64)
    ov.save_model(model, path / "unet" / "openvino_model.xml", compress_to_fp16=False)
    folder = OpenVinoFolder(
        path=path,
        name="tiny",
        family=OpenVinoFolder.open(make_tiny_folder(tmp_path / "other")).family,
        model_index={},
        configs={},
        weights={"unet": (path / "unet" / "openvino_model.bin",)},
        prediction_type="epsilon",
        has_tiny_vae=False,
    )
    assert copy_component(folder, "unet", tmp_path / "out") == 1
    assert kinds(read_ir(tmp_path / "out" / "openvino_model.xml")) == {"f16"}


def test_quantized_activations_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="quantized activations already"):
        open_source(shapes, tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    path = make_tiny_folder(tmp_path / "tiny")
    weights = path / "unet" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:10])
    with pytest.raises(RequestError, match="truncated"):
        open_source(path, tmp_path)
