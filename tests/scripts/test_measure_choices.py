"""scripts/measure_choices.py: what is compared is what its name says."""

from __future__ import annotations

from dataclasses import replace

import measure_choices
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.compress.recipes import get_recipe
from sdvino.compress.targets import get_target

IN_F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def shortcut_over_a_skip() -> ov.Model:
    """Return a block's shortcut as a UNet has it: a 1x1 convolution over block and skip."""
    block = ops.parameter([1, 6, 4, 4], ov.Type.f32, name="block")
    skip = ops.parameter([1, 4, 4, 4], ov.Type.f32, name="skip")
    joined = ops.concat([block, skip], axis=1)
    values = np.random.default_rng(0).standard_normal((8, 10, 1, 1)).astype(np.float16)
    weights = ops.convert(ops.constant(values), "f32")
    shortcut = ops.convolution(joined, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    shortcut.set_friendly_name("up_blocks.0.resnets.0.conv_shortcut/Convolution")
    return ov.Model([ops.result(shortcut)], [block, skip])


def test_a_shortcut_is_split_by_its_sources() -> None:
    model = shortcut_over_a_skip()
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((1, width, 4, 4), np.float32) for width in (6, 4)]
    before = ov.Core().compile_model(model, "CPU", IN_F32)(given)[0].copy()
    assert measure_choices.split_shortcuts(model) == 1
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("Convolution") == 2
    assert "Concat" not in kinds
    np.testing.assert_allclose(
        ov.Core().compile_model(model, "CPU", IN_F32)(given)[0], before, atol=1e-5
    )
    assert measure_choices.split_shortcuts(model) == 0


def residual(model_input: ov.Node, seed: int) -> ov.Node:
    rng = np.random.default_rng(seed)
    weights = ops.constant(rng.standard_normal((8, 8, 3, 3)).astype(np.float32) / 8)
    one = ops.convolution(model_input, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    one.set_friendly_name(f"mid_block.resnets.{seed}.conv2/Convolution")
    return ops.add(ops.relu(one), model_input)


@pytest.mark.parametrize("sums", [False, True])
def test_sums_are_quantized_where_the_variant_says_so(sums: bool) -> None:
    pytest.importorskip("nncf")
    data = ops.parameter([1, 8, 6, 6], ov.Type.f32, name="latent_sample")
    last = residual(residual(data, 0), 1)
    model = ov.Model([ops.result(last)], [data])
    rng = np.random.default_rng(2)
    samples = [{"latent_sample": rng.standard_normal((1, 8, 6, 6), np.float32)} for _ in range(4)]
    recipe = get_recipe("int8").component("vae_decoder")
    variants = measure_choices.variants(recipe, get_target("avx2-vnni"))
    chosen = variants["residual sums in 8 bits" if sums else "the recipe"]
    chosen = replace(chosen, recipe=replace(chosen.recipe, float_layers=()))
    made = measure_choices.quantized("vae_decoder", model, samples, chosen)
    quantized = [
        node
        for node in made.get_ops()
        if node.get_type_name() == "Add"
        and all(port.get_node().get_type_name() == "FakeQuantize" for port in node.input_values())
    ]
    assert bool(quantized) == sums
