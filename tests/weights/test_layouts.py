"""Names of older versions and other programs, put into those of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdvino.errors import RequestError
from sdvino.weights.autoencoder import kl_tensors, read_kl
from sdvino.weights.layouts import autoencoder, original
from sdvino.weights.layouts.diffusers import component_tensors
from sdvino.weights.layouts.rename import LayoutError
from sdvino.weights.numbers import of_array
from sdvino.weights.safetensors import Shape, Tensor
from tests.convert.mini_checkpoint import shapes_of

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": False,
}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tensors_of(shapes: dict[str, Shape]) -> dict[str, Tensor]:
    return {n: of_array(np.zeros(shape, np.float16), "F16") for n, shape in shapes.items()}


def test_an_autoencoder_of_older_diffusers(tmp_path: Path) -> None:
    expected = tensors_of(kl_tensors(CONFIG))
    old: dict[str, Any] = {}
    for name, tensor in expected.items():
        for new, before in OLD.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor.read()
    assert old.keys() != expected.keys()
    save_file(old, tmp_path / "a.safetensors")
    found = component_tensors("vae", [tmp_path / "a.safetensors"])
    assert found == expected
    assert {key: read_kl(found, "it")[key] for key in CONFIG} == CONFIG
    # Of other components nothing is changed.
    assert component_tensors("unet", [tmp_path / "a.safetensors"]).keys() == old.keys()


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    stem = "encoder.mid_block.attentions.0"
    both = {f"{stem}.{name}.weight": np.zeros((2, 2)) for name in ("query", "to_q")}
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match=r"holds a tensor twice.*to_q"):
        component_tensors("vae", [tmp_path / "a.safetensors"])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_of_older_transformers(tmp_path: Path, prefix: str) -> None:
    names = ["embeddings.token_embedding.weight", "embeddings.position_ids"]
    tensors = {f"{prefix}{name}": np.zeros((2, 2), np.float16) for name in names}
    tensors["text_projection.weight"] = np.zeros((2, 2), np.float16)
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(component_tensors("text_encoder_2", [tmp_path / "a.safetensors"])) == {
        "text_model.embeddings.token_embedding.weight",
        "text_projection.weight",
    }


def test_a_whole_checkpoint_is_split_as_far_as_it_is_there() -> None:
    tensors = tensors_of(shapes_of("sdxl"))
    found = original.split(tensors)
    assert set(found) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    joined = found["text_encoder_2"]
    source = tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
    source.read()[64:128] = 3
    key = joined["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    assert key.shape == (64, 64)
    assert np.shares_memory(key.read(), source.read())
    assert (key.read() == 3).all()
    pruned = {n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")}
    assert set(original.split(pruned)) == {"text_encoder", "text_encoder_2", "unet"}


def test_one_by_one_convolutions_become_linear_without_a_copy() -> None:
    weight = of_array(np.ones((8, 8, 1, 1), np.float16), "F16")
    (found,) = autoencoder.current({"encoder.mid.attn_1.q.weight": weight}).items()
    assert found[0] == "encoder.mid_block.attentions.0.to_q.weight"
    assert found[1].shape == (8, 8)
    assert np.shares_memory(found[1].read(), weight.read())


def test_rows_that_are_not_three_parts_are_refused() -> None:
    name = "transformer.resblocks.0.attn.in_proj_weight"
    with pytest.raises(LayoutError, match="cannot be divided"):
        original.open_clip_tensors(tensors_of({name: (64, 64)}), projection=True)
