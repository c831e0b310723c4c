"""Single files, told apart and refused by their headers; nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdvino.convert.api import make_request
from sdvino.convert.open_source import OUTLINE, Told, open_source
from sdvino.convert.single_file import SingleFile
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.text.clip_vocabulary import Vocabulary
from sdvino.weights.autoencoder import kl_tensors
from sdvino.weights.numbers import as_float32, check_finite
from tests.convert.mini_checkpoint import Shapes, shapes_of, write, write_header

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


def test_the_weights_stay_in_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.safetensors",
        shapes_of("sd2"),
        dtype=np.float32,
        values={"model.diffusion_model.out.2.weight": 2.5},
    )
    file = SingleFile.open(path)
    assert set(file.components) == {"text_encoder", "unet", "vae"}
    tensors = file.components["unet"]
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}
    out = tensors["conv_out.weight"].read()
    assert (out == 2.5).all()
    assert not out.flags.owndata
    # One matrix of the file, three of the model's.
    query = file.components["text_encoder"]["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert query.shape == query.read().shape == (64, 64)
    source = open_source(path, tmp_path / "work")
    assert isinstance(source, DiffusersFolder)
    assert source.tensors("unet") == tensors
    assert source.bytes_of("unet") == 4 * sum(tensor.size for tensor in tensors.values())
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_the_outline_is_written_once(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", shapes_of("sd2"))
    folder = tmp_path / "work"
    SingleFile.open(path).outline(folder, VOCABULARY)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    SingleFile.open(path).outline(folder, VOCABULARY)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    (folder / "model_index.json").unlink()  # stopped half-way
    SingleFile.open(path).outline(folder, VOCABULARY)
    assert set(folder.rglob("*")) == set(before)
    other = write(tmp_path / "sd_turbo.safetensors", shapes_of("sd2"))
    SingleFile.open(other).outline(folder, VOCABULARY)
    assert "sd_turbo" in (folder / "model_index.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("own", [True, False])
def test_another_vae_takes_the_place_of_a_missing_one(tmp_path: Path, own: bool) -> None:
    shapes = shapes_of("sd1") if own else without("first_stage_model.")(shapes_of("sd1"))
    path = write(tmp_path / "model.safetensors", shapes)
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32] if own else [32, 32, 32, 32],
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    vae = write(tmp_path / "vae.safetensors", kl_tensors(config), values={"quant_conv.bias": 0.5})
    request = make_request(path, vae=vae)
    opened = [request.open_source(tmp_path / "a"), request.outline_source(tmp_path / "b")[0]]
    for source in opened:
        assert isinstance(source, DiffusersFolder)
        assert source.configs["vae"]["scaling_factor"] == 0.18215
        assert source.configs["vae"]["block_out_channels"] == config["block_out_channels"]
        assert (as_float32(source.tensors("vae")["quant_conv.bias"]) == 0.5).all()
        assert source.bytes_of("vae") == sum(t.bytes for t in source.tensors("vae").values())
    if not own:
        with pytest.raises(RequestError, match="add one with --vae FILE"):
            make_request(path).open_source(tmp_path / "work")


def test_the_outline_names_no_path(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", shapes_of("sd1"))
    folder = SingleFile.open(path).outline(tmp_path / "work", VOCABULARY)
    for file in folder.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")


def test_lightning_suggests_its_own_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "sdxl_lightning_8step.safetensors", shapes_of("sdxl"))
    folder = SingleFile.open(path).outline(tmp_path / "work", VOCABULARY)
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
        check_finite(SingleFile.open(path).components[component], component)


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
        (without("first_stage_model."), "no autoencoder .* --vae FILE"),
        (without("cond_stage_model."), "no text encoder"),
        (without("model.diffusion_model."), "no UNet"),
        (without("model.diffusion_model.out."), "no conv_out.weight"),
        (without("model.diffusion_model.input_blocks.0."), "levels"),
        (without("first_stage_model.encoder.down"), "holds no AutoencoderKL"),
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


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_small_floats_are_weights(tmp_path: Path, dtype: str) -> None:
    table: dict[str, Any] = {}
    place = 0
    for name, shape in shapes_of("sd1").items():
        end = place + int(np.prod(shape)) * (2 if dtype == "BF16" else 1)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    file = SingleFile.open(write_header(tmp_path / "a.safetensors", table, bytes(place)))
    assert {tensor.dtype for tensor in file.components["unet"].values()} == {dtype}


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
    folder = open_source(path, work, Told(tokenizer=clip_folder))
    assert isinstance(folder, DiffusersFolder)
    assert folder.name == "my model"
    assert folder.path == work / OUTLINE
    assert folder.family.name == "sd2-v"
    config = json.loads((folder.path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "!"


@pytest.mark.parametrize("option", ["tokenizer", "prediction_type", "revision"])
def test_options_that_mean_nothing_here_are_refused(source: Path, option: str) -> None:
    value: Any = {"tokenizer": source, "prediction_type": "epsilon", "revision": "main"}[option]
    revision, told = (value, {}) if option == "revision" else (None, {option: value})
    with pytest.raises(RequestError, match="leave the option out"):
        open_source(source, source / "work", Told(**told), revision=revision)


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "a b/c", "x/" * 50])
def test_what_is_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        open_source(name, tmp_path)
