from __future__ import annotations

from dataclasses import replace

import openvino as ov
import pytest

from sdvino.compress.component_recipe import ComponentRecipe, Granularity
from sdvino.compress.folder import compress_component
from sdvino.compress.layers import attention_nodes, nodes_with_weights, residual_sources
from sdvino.compress.recipes import get_recipe
from sdvino.compress.targets import get_target
from sdvino.errors import RequestError, SdvinoError
from tests.compress import nets

SAMPLES = nets.samples()
VNNI = get_target("avx512-vnni")
INT8 = get_recipe("int8").component("unet")
PLAIN = ComponentRecipe(mode="int8", float_residual_sources=True)


def quantized(model: ov.Model) -> set[str]:
    """The modules whose activations are quantized."""
    return {
        op.get_friendly_name().split("/")[0].removeprefix("__module.")
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul", "ScaledDotProductAttention")
        and op.input_value(0).get_node().get_type_name() == "FakeQuantize"
    }


def test_layers_are_found_in_graph_order() -> None:
    names = [
        name.split("/")[0].removeprefix("__module.")
        for name in nodes_with_weights(nets.residual_network())
    ]
    assert names == ["upsamplers.0.conv", "resnets.0.conv1", "resnets.0.conv2"]


def test_the_convolution_that_a_block_adds_to_is_found() -> None:
    assert residual_sources(nets.residual_network()) == [
        "__module.upsamplers.0.conv/aten::_convolution/Convolution"
    ]


def test_the_products_of_attention_are_found() -> None:
    names = attention_nodes(nets.attention_network())
    assert names == ["__module.attn1/aten::scaled_dot_product_attention/SDPA"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_quantized_blocks_keep_their_residual(dynamic: bool) -> None:
    expected = nets.run(nets.residual_network(), SAMPLES[0])
    shares: list[float] = []
    model = compress_component(
        "vae_decoder", nets.residual_network(), PLAIN, SAMPLES, progress=shares.append
    )
    if not dynamic:
        model.reshape([1, nets.CHANNELS, nets.SIDE, nets.SIDE])
    assert nets.error(model, expected, SAMPLES[0]) < 0.03
    assert quantized(model) == {"resnets.0.conv1", "resnets.0.conv2"}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("target", "attention"), [("avx2", False), ("avx2-vnni", True), ("gpu", False)]
)
def test_every_target_has_a_model(target: str, attention: bool) -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    recipe = replace(INT8, float_layers=("conv_in/", "conv_out/"))
    model = compress_component(
        "unet", nets.attention_network(), recipe, SAMPLES, get_target(target)
    )
    linears = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}
    assert quantized(model) - {"attn1"} == {"mid_block.resnets.0.conv1", *linears}
    assert ("attn1" in quantized(model)) is attention
    assert nets.error(model, expected, SAMPLES[0], exact=True) < 0.1


def test_the_recipe_decides_on_attention_before_the_target() -> None:
    recipe = replace(INT8, float_layers=(), quantize_attention=True)
    model = compress_component("unet", nets.attention_network(), recipe, SAMPLES, VNNI)
    assert "attn1" in quantized(model)


def test_hybrid_quantizes_convolutions_and_the_weights_of_linears() -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    recipe = ComponentRecipe(mode="int8-hybrid", float_layers=("conv_in/", "conv_out/"))
    model = compress_component("unet", nets.attention_network(), recipe, SAMPLES, VNNI)
    assert quantized(model) == {"mid_block.resnets.0.conv1"}
    assert nets.constants(model) == {"u8", "i8", "f32"}  # linears, convolution, float convolutions
    assert nets.error(model, expected, SAMPLES[0], exact=True) < 0.05


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_scales_by_channel_or_tensor(granularity: Granularity) -> None:
    recipe = replace(PLAIN, granularity=granularity)
    model = compress_component("unet", nets.residual_network(), recipe, SAMPLES, VNNI)
    conv = next(op for op in model.get_ops() if "conv2/" in op.get_friendly_name())
    scale = conv.input_value(1).get_node().input_value(1)
    assert (scale.get_shape()[0] if len(scale.get_shape()) else 1) == (
        nets.CHANNELS if granularity == "channel" else 1
    )


def test_single_layers_stay_in_float() -> None:
    names = nodes_with_weights(nets.residual_network())
    recipe = get_recipe("fp16").with_overrides({"unet": "int8"})
    recipe = replace(recipe, components={"unet": PLAIN}).with_float_layers("unet", names[1:2])
    model = compress_component(
        "unet", nets.residual_network(), recipe.component("unet"), SAMPLES, VNNI
    )
    assert quantized(model) == {"resnets.0.conv2"}


def test_a_layer_that_is_not_there_is_named_before_the_work() -> None:
    with pytest.raises(RequestError, match=r"conv_shortcut.*matches no layer"):
        compress_component(
            "unet",
            nets.residual_network(),
            replace(PLAIN, float_layers=("conv_shortcut",)),
            SAMPLES,
        )


def test_quantization_without_samples_is_refused() -> None:
    with pytest.raises(SdvinoError, match="int8-weights"):
        compress_component("unet", nets.residual_network(), PLAIN)


def test_half_precision_is_left_alone() -> None:
    model = nets.residual_network()
    assert compress_component("unet", model, get_recipe("fp16").component("unet")) is model


def test_weights_alone_need_no_samples() -> None:
    expected = nets.run(nets.residual_network(), SAMPLES[0])
    recipe = get_recipe("int8-weights").component("unet")
    model = compress_component("unet", nets.residual_network(), recipe)
    assert nets.constants(model) == {"u8"}
    assert not quantized(model)
    assert nets.error(model, expected, SAMPLES[0]) < 0.02


def test_four_bits_go_to_linears_by_groups() -> None:
    expected = nets.run(nets.attention_network(), SAMPLES[0])
    recipe = get_recipe("int4-weights").component("unet")
    model = compress_component("unet", nets.attention_network(), recipe)
    # By sensitivity one linear keeps 8 bits, and so do the convolutions.
    assert nets.constants(model) == {"u4", "u8"}
    assert nets.error(model, expected, SAMPLES[0]) < 0.1
    whole = replace(recipe, ratio=1.0, granularity="channel", group_size=None)
    assert "u4" in nets.constants(compress_component("unet", nets.attention_network(), whole))
