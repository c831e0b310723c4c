from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.inputs.files import MAX_JSON_BYTES

Edit = Callable[[str, Any], None]


def test_a_good_folder_is_read_without_its_path(source: Path) -> None:
    folder = DiffusersFolder.open(source)
    assert folder.name == "a-model"
    assert folder.family.name == "sd1"
    assert folder.components == {
        "text_encoder": "text_encoder",
        "unet": "unet",
        "vae_decoder": "vae",
        "vae_encoder": "vae",
    }
    assert folder.latent_shape == (4, 16, 16)
    assert folder.prediction_type == "epsilon"
    assert folder.bytes_of("unet") == folder.weights["unet"][0].stat().st_size


def test_a_tiny_autoencoder_beside_the_others_is_converted_too(source: Path) -> None:
    (source / "tiny_vae").mkdir()
    (source / "tiny_vae" / "config.json").write_text('{"latent_channels": 4}', encoding="utf-8")
    save_file({"w": np.ones(1)}, source / "tiny_vae" / "diffusion_pytorch_model.safetensors")
    assert DiffusersFolder.open(source).components["tiny_vae"] == "tiny_vae"


def test_stable_diffusion_2_is_known_by_its_text_encoder(source: Path, edit: Edit) -> None:
    edit("unet/config.json", {"cross_attention_dim": 1024})
    edit("text_encoder/config.json", {"hidden_size": 1024})
    assert DiffusersFolder.open(source).family.name == "sd2"


def test_half_precision_variants_serve_when_there_is_nothing_else(source: Path) -> None:
    unet = source / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    half = unet / "diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(plain.read_bytes())
    assert DiffusersFolder.open(source).weights["unet"] == (plain,)
    plain.unlink()
    assert DiffusersFolder.open(source).weights["unet"] == (half,)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "text_encoder_2"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "1.x, 2.x and XL"),
        ("model_index.json", {"requires_aesthetics_score": True}, "refiner"),
        ("model_index.json", {"_class_name": ["x"]}, "convert takes"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "UNet2DConditionModel"),
        ("model_index.json", {"vae": "AutoencoderKL"}, "AutoencoderKL there"),
        ("unet/config.json", {"in_channels": 8}, "text-to-image"),
        ("unet/config.json", {"addition_embed_type": "text"}, "conditioned on text"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "conditioned on timestep"),
        ("unet/config.json", {"time_cond_proj_dim": 0}, "whole number"),
        ("unet/config.json", {"in_channels": True}, "whole number"),
        ("unet/config.json", {"sample_size": 10**9}, "whole number"),
        ("unet/config.json", {"sample_size": [64, 96]}, "whole number"),
        ("unet/config.json", {"cross_attention_dim": 64}, "different models"),
        ("unet/config.json", {"cross_attention_dim": None}, "whole number"),
        ("text_encoder/config.json", {"vocab_size": -1}, "whole number"),
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "not valid JSON"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    ],
)
def test_configs_that_lie_are_refused(
    source: Path, edit: Edit, file: str, changes: Any, message: str
) -> None:
    edit(file, changes)
    with pytest.raises(RequestError, match=message):
        DiffusersFolder.open(source)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model_index.json", "not a diffusers folder"),
        ("unet/config.json", "complete"),
        ("scheduler/scheduler_config.json", "complete"),
        ("vae/diffusion_pytorch_model.safetensors", "no .safetensors"),
        ("tokenizer/merges.txt", "tokenizer.json"),
    ],
)
def test_missing_files_are_named(source: Path, file: str, message: str) -> None:
    (source / file).unlink()
    with pytest.raises(RequestError, match=message):
        DiffusersFolder.open(source)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[1]", b"[" * 100_000, b" " * (MAX_JSON_BYTES + 1)]
)
def test_json_that_is_none_is_refused(source: Path, content: bytes) -> None:
    (source / "unet" / "config.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"config\.json"):
        DiffusersFolder.open(source)


def test_a_part_that_the_index_lists_and_nobody_has_is_named(source: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    path = source / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(RequestError, match="00002-of-00002"):
        DiffusersFolder.open(source)


def test_a_component_may_stand_elsewhere(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"latent_channels": 4, "x": 1}', encoding="utf-8")
    save_file({"w": np.ones(1)}, other / "diffusion_pytorch_model.safetensors")
    folder = DiffusersFolder.open(source).with_folder("vae", other)
    assert folder.folder("vae") == other
    assert folder.folder("unet") == source / "unet"
    assert folder.configs["vae"]["x"] == 1
    (other / "config.json").write_text('{"latent_channels": 16}', encoding="utf-8")
    with pytest.raises(RequestError, match="16"):
        DiffusersFolder.open(source).with_folder("vae", other)


@pytest.mark.parametrize("keep", [0, 7, -1])
def test_damaged_weights_are_refused(source: Path, keep: int) -> None:
    file = source / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RequestError, match="damaged"):
        DiffusersFolder.open(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_are_never_opened(source: Path, name: str) -> None:
    (source / "text_encoder" / "model.safetensors").unlink()
    (source / "text_encoder" / name).write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match="pickle"):
        DiffusersFolder.open(source)


def test_what_is_no_folder_is_refused(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(RequestError, match="is a file"):
        DiffusersFolder.open(file)
    with pytest.raises(RequestError, match="does not exist"):
        DiffusersFolder.open(tmp_path / "nothing")
    (source / "unet" / "openvino_model.xml").touch()
    with pytest.raises(RequestError, match="OpenVINO model already"):
        DiffusersFolder.open(source)
