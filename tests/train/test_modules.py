"""Components that no longer fit their config, kept on the disk and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdvino.errors import RequestError
from sdvino.nets.structure import STRUCTURE_FILE, Structure
from sdvino.train.calls import operations, outputs_of, relative_error
from sdvino.train.modules import apply, load_component, save_component
from tests.compress.tiny_unet import CONFIG, calls, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FEED_FORWARD = "up_blocks.1.attentions.0.transformer_blocks.0.ff"


def test_nothing_removed_is_the_original_to_the_bit(tmp_path: Path) -> None:
    unet = tiny_unet()
    save_component(unet, tmp_path, config=CONFIG, structure=Structure(), dtype="float32")
    found = load_component(tmp_path, "unet")
    assert Structure.read(tmp_path) == Structure()
    for (name, one), (other_name, other) in zip(
        unet.state_dict().items(), found.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert one.equal(other)
    assert relative_error(outputs_of(found, calls()), outputs_of(unet, calls())) == 0.0


def test_a_plain_folder_of_diffusers_is_the_trivial_case(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    found = load_component(tmp_path, "unet")
    assert Structure.read(tmp_path) is None
    assert relative_error(outputs_of(found, calls()), outputs_of(unet, calls())) == 0.0


def test_every_kind_of_change_survives_the_way_to_the_disk(tmp_path: Path) -> None:
    structure = Structure(
        removed=("mid_block.resnets.1", "mid_block.attentions.0", "up_blocks.0.resnets.1"),
        heads={ATTENTION: 3},
        channels={FEED_FORWARD: 20},
        ranks={"down_blocks.0.resnets.0.conv1": 5, "time_embedding.linear_1": 7},
    )
    unet = tiny_unet()
    apply(structure, unet)
    for parameter in unet.requires_grad_(False).parameters():
        parameter.normal_(std=0.05)
    save_component(unet, tmp_path, config=CONFIG, structure=structure, dtype="float32")
    found = load_component(tmp_path, "unet")
    assert Structure.read(tmp_path) == structure
    assert relative_error(outputs_of(found, calls()), outputs_of(unet, calls())) == 0.0
    assert sum(operations("unet", CONFIG, structure).values()) < sum(
        operations("unet", CONFIG, Structure()).values()
    )


def test_half_precision_holds_what_it_can(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.conv_in.bias[0] = 1e6
    save_component(unet, tmp_path, config=CONFIG, structure=Structure())
    found = load_component(tmp_path, "unet")
    assert float(found.conv_in.bias[0]) == 1e6
    weight = unet.conv_out.weight
    assert found.conv_out.weight.equal(weight.half().float())
    assert not found.conv_out.weight.equal(weight)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_the_other_components_too(tmp_path: Path, component: str) -> None:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    if component == "vae":
        model: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
        sample: dict[str, Any] = {"latent_sample": np.ones((1, 4, 4, 4), np.float32)}
        names, config = ["decoder.mid_block.resnets.0.conv1"], dict(model.config)
    else:
        text = CLIPTextConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        torch.manual_seed(0)
        model, config = CLIPTextModel(text).eval(), text.to_dict()
        sample = {"input_ids": np.arange(77, dtype=np.int64)[None]}
        names = ["text_model.encoder.layers.0.mlp.fc1"]
    structure = Structure(ranks=dict.fromkeys(names, 4))
    apply(structure, model)
    save_component(model, tmp_path, config=config, structure=structure, dtype="float32")
    found = load_component(tmp_path, component)
    assert relative_error(outputs_of(found, [sample]), outputs_of(model, [sample])) == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 9}, "format 9"),
        ({"removed": "all"}, "list of names"),
        ({"removed": ["conv_in", "conv_in"]}, "twice"),
        ({"removed": ["conv_in"]}, "cannot be left out"),
        ({"removed": ["down_blocks.1.resnets.0"]}, "cannot be left out"),
        ({"removed": ["__class__"]}, "has not"),
        ({"removed": [""]}, "cannot be left out"),
        ({"heads": {"no.such.layer": 1}}, "has not"),
        ({"heads": {"conv_in": 1}}, "which has 0"),
        ({"heads": {ATTENTION: 5}}, "which has 4"),
        ({"heads": {ATTENTION: 0}}, "a count"),
        ({"heads": {ATTENTION: True}}, "a count"),
        ({"heads": [ATTENTION]}, "no table"),
        ({"channels": {ATTENTION: 2}}, "which has 0"),
        ({"channels": {FEED_FORWARD: 10**5}}, "which has 64"),
        ({"ranks": {"conv_in": 10**9}}, "a count"),
        ({"ranks": {"conv_in": 37}}, "which has 16"),
        ({"ranks": {"conv_norm_out": 1}}, "which has 0"),
        # Possible, but not what the weights are.
        ({"heads": {ATTENTION: 2}}, "do not fit"),
        ({"ranks": {"conv_in": 3}}, "do not fit"),
    ],
)
def test_a_structure_is_not_believed(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    save_component(tiny_unet(), tmp_path, config=CONFIG, structure=Structure())
    path = tmp_path / STRUCTURE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises(RequestError, match=said) as caught:
        load_component(tmp_path, "unet")
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    unet = tiny_unet()
    save_component(unet, tmp_path, config=CONFIG, structure=Structure())
    file = next(tmp_path.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(RequestError, match="damaged"):
        load_component(tmp_path, "unet")
    unet.conv_in.bias[0] = float("nan")
    save_component(unet, tmp_path, config=CONFIG, structure=Structure())
    with pytest.raises(RequestError, match="not numbers"):
        load_component(tmp_path, "unet")
