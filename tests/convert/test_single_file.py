"""Single files, told apart and refused by their headers; nothing here needs torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdvino.convert.clip_vocabulary import Vocabulary
from sdvino.convert.open_source import UNPACKED, open_source
from sdvino.convert.single_file import SingleFile
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from tests.convert.mini_checkpoint import Shapes, shapes_of, write

VOCABULARY = Vocabulary({"a": 0}, [("a", "b")])


@pytest.mark.parametrize(
    ("kind", "name", "extra", "metadata", "family"),
    [
        ("sd1", "dreamshaper_8", {}, {}, "sd1"),
        ("sd1", "sd-v1-5-inpainting", {"unet_in": 9}, {}, "sd1-inpaint"),
        ("sd2", "v2-1_768-ema-pruned", {}, {}, "sd2-v"),
        ("sd2", "illuminati", {}, {}, "sd2-v"),
        ("sd2", "v2-1_512-base", {}, {}, "sd2"),
        ("sd2", "illuminati", {}, {"modelspec.prediction_type": "epsilon"}, "sd2"),
        ("sd2", "sd_turbo", {}, {}, "sd-turbo"),
        ("sd2", "512-inpainting-ema", {"unet_in": 9}, {}, "sd2-inpaint"),
        ("sdxl", "juggernaut", {}, {}, "sdxl"),
        ("sdxl", "sd_xl_turbo_1.0_fp16", {}, {}, "sdxl-turbo"),
        ("sdxl", "sdxl_lightning_4step", {}, {}, "sdxl-lightning"),
        ("sdxl", "sdxl-inpaint", {"unet_in": 9}, {}, "sdxl-inpaint"),
    ],
)
def test_the_family_is_told_from_names_shapes_and_last_the_file_s_name(
    tmp_path: Path,
    kind: str,
    name: str,
    extra: dict[str, int],
    metadata: dict[str, str],
    family: str,
) -> None:
    shapes = shapes_of(kind)
    if "unet_in" in extra:
        shapes["model.diffusion_model.input_blocks.0.0.weight"] = (64, extra["unet_in"], 3, 3)
    file = SingleFile.open(write(tmp_path / f"{name}.safetensors", shapes, metadata=metadata))
    assert file.family.name == family
    assert file.configs["unet"]["sample_size"] == file.family.native_size // 8
    assert file.configs["scheduler"]["prediction_type"] == file.family.prediction_type


def test_what_the_person_says_goes_before_every_hint(tmp_path: Path) -> None:
    path = write(
        tmp_path / "v2-1_768.safetensors",
        shapes_of("sd2"),
        metadata={"modelspec.prediction_type": "v", "modelspec.resolution": "640x640"},
    )
    assert SingleFile.open(path).family.name == "sd2-v"
    told = SingleFile.open(path, prediction_type="epsilon")
    assert told.family.name == "sd2"
    assert told.configs["scheduler"]["prediction_type"] == "epsilon"
    assert told.configs["unet"]["sample_size"] == 80


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "sd2-v"),
        ("model:\n  params:\n    unet_config:\n      target: x\n", "sd2"),
        ("unrelated: 1\n", "sd2-v"),
    ],
)
def test_a_yaml_beside_the_file_is_heard(tmp_path: Path, text: str, family: str) -> None:
    path = write(tmp_path / "model.safetensors", shapes_of("sd2"))
    (tmp_path / "model.yaml").write_text(text, encoding="utf-8")
    assert SingleFile.open(path).family.name == family


def test_a_v_prediction_fine_tune_of_sdxl_marks_itself(tmp_path: Path) -> None:
    marks = {"v_pred": (1,), "ztsnr": (1,)}
    file = SingleFile.open(write(tmp_path / "noob.safetensors", {**shapes_of("sdxl"), **marks}))
    scheduler = file.configs["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True


def test_the_configs_are_those_of_the_shapes(tmp_path: Path) -> None:
    file = SingleFile.open(write(tmp_path / "model.safetensors", shapes_of("sdxl")))
    unet = file.configs["unet"]
    assert unet["cross_attention_dim"] == 128
    assert unet["addition_time_embed_dim"] == 8
    assert unet["attention_head_dim"] == [1]
    assert file.configs["vae"]["scaling_factor"] == 0.13025
    assert file.configs["vae"]["force_upcast"] is True
    assert file.configs["text_encoder"]["hidden_act"] == "quick_gelu"
    assert file.configs["text_encoder_2"]["num_hidden_layers"] == 2


def test_unpacking_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", shapes_of("sd2"), dtype=np.float32)
    folder = tmp_path / "work"
    parts: list[str] = []
    file = SingleFile.open(path)
    file.unpack(folder, VOCABULARY, lambda what, _: parts.append(what))
    assert parts == ["unpack text_encoder", "unpack unet", "unpack vae"]
    assert all(
        tensor.dtype == np.float16
        for weights in folder.rglob("*.safetensors")
        for tensor in load_file(weights).values()
    )
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    file.unpack(folder, VOCABULARY, lambda what, _: pytest.fail(what))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    parts.clear()
    (folder / "model_index.json").unlink()
    next((folder / "vae").glob("*.safetensors")).unlink()
    file.unpack(folder, VOCABULARY, lambda what, _: parts.append(what))
    assert parts == ["unpack vae"]

    parts.clear()
    os.utime(path, ns=(1, 1))  # another file under the same name
    SingleFile.open(path).unpack(folder, VOCABULARY, lambda what, _: parts.append(what))
    assert len(parts) == 3


def test_the_unpacked_folder_names_no_path(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", shapes_of("sd1"))
    folder = SingleFile.open(path).unpack(tmp_path / "work", VOCABULARY)
    for file in folder.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")


def test_lightning_suggests_its_own_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "sdxl_lightning_8step.safetensors", shapes_of("sdxl"))
    folder = SingleFile.open(path).unpack(tmp_path / "work", VOCABULARY)
    told = json.loads((folder / "sdvino.json").read_text(encoding="utf-8"))
    assert told == {"suggested": {"num_inference_steps": 8}}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, component: str) -> None:
    name = {
        "unet": "model.diffusion_model.out.2.weight",
        "vae": "first_stage_model.decoder.conv_in.weight",
        "text_encoder": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    }[component]
    path = write(tmp_path / "a.safetensors", shapes_of("sd1"), values={name: np.nan})
    with pytest.raises(RequestError, match="not numbers"):
        SingleFile.open(path).unpack(tmp_path / "work", VOCABULARY)
    assert not list((tmp_path / "work" / component).glob("*.safetensors"))


def without(prefix: str) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {n: s for n, s in shapes.items() if not n.startswith(prefix)}


def only(*names: str) -> Callable[[Shapes], Shapes]:
    return lambda _: dict.fromkeys(names, (2, 2))


def changed(**names: tuple[int, ...]) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {**shapes, **{n.replace("__", "."): s for n, s in names.items()}}


UNET = "model__diffusion_model__"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("first_stage_model."), "no autoencoder"),
        (without("cond_stage_model."), "no text encoder"),
        (without("model.diffusion_model."), "no UNet"),
        (without("model.diffusion_model.out."), "no out.2.weight"),
        (without("model.diffusion_model.input_blocks.0."), "levels"),
        (without("first_stage_model.encoder.down"), r"no encoder.down"),
        (only("lora_unet_down_blocks_0.lora_down.weight"), "--lora"),
        (only("unet.down.attn.to_q.lora_A.weight"), "--lora"),
        (only("control_model.time_embed.0.weight"), "ControlNet"),
        (only("emb_params"), "textual inversion"),
        (only("model.diffusion_model.joint_blocks.0.x.weight"), "Diffusion 3"),
        (only("double_blocks.0.img_attn.norm.weight"), "Flux"),
        (only("conditioner.embedders.0.model.ln_final.weight"), "refiner"),
        (only("decoder.conv_in.weight"), "--vae"),
        (only("down_blocks.0.resnets.0.conv1.weight"), "diffusers' naming"),
        (only("input_blocks.0.0.weight"), "UNet alone"),
        (only("text_model.final_layer_norm.weight"), "text encoder alone"),
        (only("something.else"), "no UNet"),
        (changed(**{UNET + "label_emb__0__0__weight": (8, 8)}), "class labels"),
        (changed(**{UNET + "surprise__weight": (8, 8)}), "surprise"),
        (changed(**{UNET + "input_blocks__7__0__in_layers__0__weight": (8,)}), "levels"),
        (changed(**{UNET + "out__2__weight": (4, 0, 3, 3)}), "shape"),
        (changed(**{UNET + "out__0__weight": (20_000,)}), "shape"),
        (changed(first_stage_model__extra__weight=(3,)), "extra"),
    ],
)
def test_files_of_other_kinds_get_a_sentence(
    tmp_path: Path, change: Callable[[Shapes], Shapes], message: str
) -> None:
    path = write(tmp_path / "a.safetensors", change(shapes_of("sd1")))
    with pytest.raises(RequestError, match=message) as caught:
        SingleFile.open(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((f"model{suffix}", "pickle") for suffix in (".ckpt", ".pt", ".bin", ".pth", ".CKPT")),
        ("model.gguf", "another kind"),
        ("model", "another kind"),
    ],
)
def test_pickles_and_other_files_are_refused_by_name(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match=message):
        open_source(tmp_path / name, tmp_path / "work")


def test_integers_for_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", shapes_of("sd1"), dtype=np.int8)
    with pytest.raises(RequestError, match="stored as I8"):
        SingleFile.open(path)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_download_that_was_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.safetensors", shapes_of("sd1"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RequestError, match="damaged"):
        SingleFile.open(path)


def test_a_single_file_becomes_a_checked_folder(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "my model.safetensors", shapes_of("sd2"))
    work = tmp_path / "work"
    folder = open_source(path, work, tokenizer=clip_folder)
    assert isinstance(folder, DiffusersFolder)
    assert folder.name == "my model"
    assert folder.path == work / UNPACKED
    assert folder.family.name == "sd2-v"
    config = json.loads((folder.path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "!"


@pytest.mark.parametrize("option", ["tokenizer", "prediction_type", "revision"])
def test_options_that_mean_nothing_here_are_refused(source: Path, option: str) -> None:
    value: Any = {"tokenizer": source, "prediction_type": "epsilon", "revision": "main"}[option]
    with pytest.raises(RequestError, match="leave the option out"):
        open_source(source, source / "work", **{option: value})


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "a b/c", "x/" * 50])
def test_what_is_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        open_source(name, tmp_path)
