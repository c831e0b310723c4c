from __future__ import annotations

import pytest

from sdvino.compress.fragile import fragile_nodes, is_fragile

CONV = "/aten::_convolution/Convolution"
LINEAR = "/aten::linear/MatMul"


@pytest.mark.parametrize(
    ("component", "node", "fragile"),
    [
        ("unet", f"__module.conv_in{CONV}", True),
        ("unet", f"__module.conv_out{CONV}", True),
        ("unet", f"__module.time_embedding.linear_1{LINEAR}", True),
        ("unet", f"__module.add_embedding.linear_2{LINEAR}", True),
        ("unet", f"__module.up_blocks.1.resnets.0.time_emb_proj{LINEAR}", True),
        ("unet", f"__module.up_blocks.1.resnets.0.conv_shortcut{CONV}", True),
        ("unet", f"__module.up_blocks.1.resnets.0.conv1{CONV}", False),
        ("unet", f"__module.down_blocks.0.downsamplers.0.conv{CONV}", False),
        ("unet", f"__module.mid_block.attentions.0.proj_in{CONV}", False),
        ("unet", f"__module.mid_block.attentions.0.proj_out{CONV}", False),
        ("unet", f"__module.mid_block.attentions.0.transformer_blocks.0.attn1.to_q{LINEAR}", False),
        ("vae_decoder", f"__module.decoder.conv_in{CONV}", True),
        ("vae_decoder", f"__module.decoder.conv_out{CONV}", True),
        ("vae_decoder", f"__module.post_quant_conv{CONV}", True),
        ("vae_decoder", f"__module.decoder.up_blocks.2.resnets.0.conv_shortcut{CONV}", True),
        ("vae_decoder", f"__module.decoder.up_blocks.2.resnets.0.conv1{CONV}", False),
        ("vae_encoder", f"__module.quant_conv{CONV}", True),
        ("vae_encoder", f"__module.encoder.conv_in{CONV}", True),
        ("text_encoder", f"__module.text_model.final_layer_norm{LINEAR}", False),
    ],
)
def test_fragile_layers_are_named_as_in_diffusers(component: str, node: str, fragile: bool) -> None:
    assert is_fragile(component, node) is fragile
    assert fragile_nodes(component, [node]) == ([node] if fragile else [])


def test_the_tiny_decoder_keeps_its_ends() -> None:
    nodes = [f"decoder.layers.{i}" for i in (1, 3, 7)]
    assert fragile_nodes("tiny_vae", nodes) == ["decoder.layers.1", "decoder.layers.7"]
    assert fragile_nodes("tiny_vae", []) == []
