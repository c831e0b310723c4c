from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.parts import Joiner, choose_ends, cut_at_ends
from sdvino.compress.quantization import quantize
from sdvino.compress.recipes import get_recipe
from sdvino.compress.stepwise import Evaluator
from sdvino.compress.targets import get_target
from sdvino.graph.cut import split
from tests.compress import nets

CONTEXT = np.random.default_rng(2).standard_normal((4, 1, 4, nets.CHANNELS), dtype=np.float32)
SAMPLES = [
    {**sample, "context": told} for sample, told in zip(nets.samples(), CONTEXT, strict=True)
]
VNNI = get_target("avx512-vnni")
SKIP = "__module.skip/aten::add/Add"
# What NNCF takes for a convolution of `nets`: weights, input and output, each twice.
CONVOLUTION = 8 * (9 * nets.CHANNELS**2 + 2 * nets.CHANNELS * nets.SIDE**2)
#: Of those, when it is not evaluated: nothing but weights.
WEIGHTS = 8 * 9 * nets.CHANNELS**2


def blocks() -> ov.Model:
    """Blocks with residuals that all read one input; the last one reads what the first one gave."""
    rng = np.random.default_rng(0)
    x = nets.parameter([-1, nets.CHANNELS, -1, -1], "sample")
    context = nets.parameter([-1, 4, nets.CHANNELS], "context")
    h = first = nets.convolution(x, "conv_in", rng)
    for index in range(4):
        residual = h
        for layer in ("conv1", "conv2"):
            h = nets.convolution(
                ops.swish(nets.normalize(h)), f"blocks.{index}.resnets.0.{layer}", rng
            )
        told = nets.linear(context, f"blocks.{index}.to_k", rng, nets.CHANNELS)
        told = ops.transpose(ops.reduce_mean(told, [1], True), [0, 2, 1])
        h = ops.add(residual, ops.multiply(h, ops.unsqueeze(told, [3])))
        h.set_friendly_name(f"__module.blocks.{index}/aten::add/Add")
        first = h if index == 0 else first
    h = ops.add(h, nets.convolution(ops.swish(first), "skip", rng))
    h.set_friendly_name(SKIP)
    h = nets.convolution(h, "conv_out", rng)
    model = ov.Model([h], [x, context], "blocks")
    model.output(0).get_tensor().set_names({"out_sample"})
    model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    return model


def scales(model: ov.Model) -> dict[tuple[str, int], list[float]]:
    """The range of every quantized input of a product, by its name and port."""
    found = {}
    for op in model.get_ops():
        if op.get_type_name() in ("Convolution", "MatMul"):
            for port, value in enumerate(op.input_values()):
                node = value.get_node()
                if node.get_type_name() == "FakeQuantize":
                    ends = [node.input_value(i).get_node() for i in (1, 2)]
                    if all(end.get_type_name() == "Constant" for end in ends):
                        found[op.get_friendly_name(), port] = [float(e.data.min()) for e in ends]
    return found


def joined(model: ov.Model, ends: Sequence[str]) -> ov.Model:
    """Return what the parts of ``model`` make together again."""
    joiner = Joiner(model.clone())
    for part, ports in split(model.clone(), lambda whole: cut_at_ends(whole, ends)):
        joiner.add(part, ports)
    return joiner.finish()


def test_a_model_that_fits_is_left_whole() -> None:
    assert choose_ends(blocks(), SAMPLES[0], 100 * CONVOLUTION) == ()


@pytest.mark.parametrize("convolutions", [1, 3, 5])
def test_a_model_is_cut_where_blocks_end(convolutions: int) -> None:
    ends = choose_ends(blocks(), SAMPLES[0], convolutions * CONVOLUTION)
    sums = [*(f"__module.blocks.{index}/aten::add/Add" for index in range(4)), SKIP]
    assert set(ends) <= set(sums)
    assert list(ends) == sorted(ends)
    # Eleven layers: one, two in each of four blocks, and two. Where there is a choice, one value
    # crosses rather than two.
    assert len(ends) == {1: 5, 3: 4, 5: 2}[convolutions]


def test_parts_joined_compute_what_the_whole_does() -> None:
    model = blocks()
    ends = choose_ends(model, SAMPLES[0], 3 * CONVOLUTION)
    again = joined(model, ends)
    for sample in SAMPLES:
        np.testing.assert_array_equal(nets.run(again, sample), nets.run(model, sample))
    assert again.output(0).get_names() == {"out_sample"}
    assert again.input("sample").get_partial_shape() == ov.PartialShape([-1, nets.CHANNELS, -1, -1])
    assert again.get_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]).value == "8.0"
    names = [sorted(op.get_friendly_name() for op in of.get_ops()) for of in (again, model)]
    assert names[0] == names[1]


def test_what_crosses_is_taken_by_all_that_read_it() -> None:
    ends = [f"__module.blocks.{index}/aten::add/Add" for index in (0, 2)]
    parts = split(blocks(), lambda whole: cut_at_ends(whole, ends))
    taken = [{name for name, _ in ports.taken.values()} for _, ports in parts]
    assert [end in taken[2] for end in ends] == [True, True]
    assert ends[0] in taken[1]
    assert not taken[0]


def test_a_model_runs_in_parts(tmp_path: Path) -> None:
    model = blocks()
    expected = [nets.run(model, sample) for sample in SAMPLES]
    ends = choose_ends(model, SAMPLES[0], 3 * CONVOLUTION)
    found = Evaluator(model, ends).evaluate(SAMPLES, tmp_path)
    assert not list(tmp_path.iterdir())  # what was read by all is let go of
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def of_one_shape() -> ov.Model:
    """Blocks of which the last takes its shape from before the first."""
    rng = np.random.default_rng(1)
    x = nets.parameter([-1, nets.CHANNELS, -1, -1], "sample")
    h = nets.convolution(x, "conv_in", rng)
    sides = ops.gather(ops.shape_of(h), ops.constant([2, 3]), ops.constant(0))
    shape = ops.concat([ops.constant(np.array([1, nets.CHANNELS])), sides], 0)
    for index in range(4):
        told = nets.convolution(ops.swish(nets.normalize(h)), f"blocks.{index}.conv", rng)
        if index == 3:
            told = ops.reshape(ops.reshape(told, [1, nets.CHANNELS, -1], False), shape, False)
        h = ops.add(h, told)
        h.set_friendly_name(f"__module.blocks.{index}/aten::add/Add")
    model = ov.Model([nets.convolution(h, "conv_out", rng)], [x], "of one shape")
    model.output(0).get_tensor().set_names({"out_sample"})
    return model


def test_a_shape_that_crosses_holds_nothing_together(tmp_path: Path) -> None:
    samples = [{"sample": sample["sample"]} for sample in SAMPLES]
    model = of_one_shape()
    ends = choose_ends(model, samples[0], CONVOLUTION)
    assert ends == tuple(f"__module.blocks.{index}/aten::add/Add" for index in range(4))
    expected = [nets.run(model, sample) for sample in samples]
    again = joined(model, ends)
    for sample in [*samples, {"sample": samples[0]["sample"][:, :, :4, :6]}]:
        np.testing.assert_array_equal(nets.run(again, sample), nets.run(model, sample))
    found = Evaluator(model, ends).evaluate(samples, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int8-hybrid"])
def test_quantizing_in_parts_is_quantizing_the_whole(recipe: str, tmp_path: Path) -> None:
    chosen = get_recipe(recipe).component("unet")
    chosen = ComponentRecipe(
        mode=chosen.mode,
        float_layers=("conv_in/", "conv_out/"),
        smooth_quant_alpha=chosen.smooth_quant_alpha,
    )
    shares: list[float] = []
    whole, parts = (
        quantize(
            "unet",
            blocks(),
            SAMPLES,
            recipe=chosen,
            target=VNNI,
            progress=shares.append,
            part_bytes=limit,
            scratch=tmp_path,
        )
        for limit in (100 * WEIGHTS, 3 * WEIGHTS)
    )
    assert scales(parts).keys() == scales(whole).keys()
    assert len(scales(parts)) == {"int8": 13, "int8-hybrid": 9}[recipe]
    for name, (low, high) in scales(whole).items():
        np.testing.assert_allclose(scales(parts)[name], (low, high), rtol=1e-3, err_msg=str(name))
    expected = nets.run(blocks(), SAMPLES[0])
    both = [nets.error(model, expected, SAMPLES[0], exact=True) for model in (whole, parts)]
    assert both[1] == pytest.approx(both[0], rel=0.1)
    assert not list(tmp_path.iterdir())
    second = shares[shares.index(1.0) + 1 :]
    assert second == sorted(second)
    assert second[-1] == 1.0


@pytest.mark.slow
def test_weights_come_from_the_file_that_is_mapped(tmp_path: Path) -> None:
    xml = tmp_path / "openvino_model.xml"
    ov.save_model(blocks(), xml, compress_to_fp16=True)
    recipe = ComponentRecipe(mode="int8", float_layers=("conv_in/", "conv_out/"))
    model = quantize("unet", xml, SAMPLES, recipe=recipe, target=VNNI, part_bytes=3 * WEIGHTS)
    expected = nets.run(blocks(), SAMPLES[0])
    assert nets.error(model, expected, SAMPLES[0], exact=True) < 0.1
