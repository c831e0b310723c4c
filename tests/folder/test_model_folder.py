from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdvino.errors import ModelFolderError
from sdvino.folder.index import ModelFolder
from sdvino.folder.manifest import Manifest, ManifestComponent, Suggested
from sdvino.inputs.ir import summarize_ir
from tests.conftest import SHAPES
from tests.tiny_folder import edit_json, make_tiny_folder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_folder(tmp_path / "model")


def refused(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        ModelFolder.open(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    return message


def test_a_folder_says_what_it_is(folder: Path) -> None:
    model = ModelFolder.open(str(folder))
    assert model.name == "tiny"
    assert list(model.components) == ["text_encoder", "unet", "vae_decoder"]
    assert (model.height, model.width, model.vae_scale_factor) == (128, 128, 8)
    assert (model.in_channels, model.latent_channels) == (4, 4)
    assert (model.cross_attention_dim, model.text_length) == (32, 77)
    assert model.scaling_factor == 0.18215
    assert model.shift_factor is None
    assert model.prediction_type == "v_prediction"
    assert model.suggested == Suggested(
        num_inference_steps=8, guidance_scale=4.0, scheduler="dpmpp_2m"
    )
    unet = model.components["unet"]
    assert unet.bytes == unet.xml.stat().st_size + unet.bin.stat().st_size
    assert unet.ir.inputs["sample"] == (None, 4, None, None)
    assert unet.ir.weights_end == unet.bin.stat().st_size
    assert sum(unet.ir.weights.values()) <= unet.bin.stat().st_size
    assert not unet.ir.quantized
    assert model.tokenizer() == folder / "tokenizer"
    assert model.tokenizer("text_encoder_2") == folder / "tokenizer_2"


def test_what_weights_are_stored_as_is_read() -> None:
    folder = ModelFolder.open(SHAPES)
    unet, text = folder.components["unet"].ir, folder.components["text_encoder"].ir
    assert unet.quantized
    assert not text.quantized
    # About half of the demo's 8-bit weights are convolutions'.
    assert unet.weights["i8", True] > 2_000_000 > unet.weights["i8", False] > 1_000_000
    assert unet.weights["f16", True] > 300_000
    assert max(text.weights, key=lambda kind: text.weights[kind])[1] is False


def test_the_defaults_are_those_of_diffusers(folder: Path) -> None:
    (folder / "sdvino.json").unlink()
    write_json(folder / "vae_decoder" / "config.json", {"block_out_channels": [8, 8, 8, 8]})
    write_json(folder / "unet" / "config.json", {"cross_attention_dim": [32, 32]})
    write_json(folder / "text_encoder" / "config.json", {})
    model = ModelFolder.open(folder)
    assert model.manifest is None
    assert model.suggested == Suggested()
    assert model.name == "model"
    assert model.scaling_factor == 0.18215
    assert (model.height, model.width) == (512, 512)


def test_a_size_that_is_not_square(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=[16, 24])
    (folder / "sdvino.json").unlink()  # which says how long that file is
    model = ModelFolder.open(folder)
    assert (model.height, model.width) == (128, 192)


def test_a_folder_that_optimum_saved(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="OVStableDiffusionPipeline")
    assert ModelFolder.open(folder).model_index["_class_name"] == "OVStableDiffusionPipeline"


@dataclass(frozen=True)
class Damage:
    name: str
    words: tuple[str, ...]
    do: Callable[[Path], object]


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def torch_folder(folder: Path) -> None:
    for file in folder.rglob("openvino_model.*"):
        file.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)


def timestep_cond(folder: Path) -> None:
    xml = folder / "unet" / "openvino_model.xml"
    text = xml.read_text(encoding="utf-8")
    layer = (
        '<layer id="99" name="timestep_cond" type="Parameter" version="opset1">'
        '<data shape="?,256" element_type="f32"/><output><port id="0" precision="FP32"'
        ' names="timestep_cond"><dim>-1</dim><dim>256</dim></port></output></layer></layers>'
    )
    xml.write_text(text.replace("</layers>", layer), encoding="utf-8")


def config(part: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / part / "config.json", **changes)


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content, encoding="utf-8")


UNET_XML, UNET_BIN = "unet/openvino_model.xml", "unet/openvino_model.bin"
BOMB = '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "aaaa">]><net name="&a;"></net>'
DAMAGES = [
    Damage("no index", ("model_index.json",), lambda f: (f / "model_index.json").unlink()),
    Damage("index cut", ("model_index.json", "JSON"), text("model_index.json", "{")),
    Damage("index a list", ("model_index.json", "object"), text("model_index.json", "[]")),
    Damage("index nested", ("model_index.json",), text("model_index.json", "[" * 100_000)),
    Damage("index binary", ("model_index.json",), text("model_index.json", "\0\0\0")),
    Damage("no pipeline", ("name a pipeline",), text("model_index.json", "{}")),
    Damage(
        "another pipeline",
        ("FluxPipeline",),
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
    ),
    Damage("torch folder", ("torch", "sdvino convert"), torch_folder),
    Damage("no xml", ("unet", "missing"), lambda f: (f / UNET_XML).unlink()),
    Damage("no bin", ("unet", "missing"), lambda f: (f / UNET_BIN).unlink()),
    Damage("bin cut", ("unet", "truncated"), lambda f: truncated(f / UNET_BIN)),
    Damage("xml cut", ("unet", "damaged"), lambda f: truncated(f / UNET_XML)),
    Damage("xml empty", ("unet", "damaged"), text(UNET_XML, "")),
    Damage("not an IR", ("unet", "not an OpenVINO model"), text(UNET_XML, "<a/>")),
    Damage("entity bomb", ("unet", "not an OpenVINO model"), text(UNET_XML, BOMB)),
    Damage("no inputs", ("unet", "no input"), text(UNET_XML, "<net></net>")),
    Damage("extra input", ("timestep_cond",), timestep_cond),
    Damage("no config", ("unet/config.json",), lambda f: (f / "unet/config.json").unlink()),
    Damage("NaN", ("vae_decoder/config.json",), config("vae_decoder", scaling_factor=float("nan"))),
    Damage("1e999", ("unet/config.json",), text("unet/config.json", '{"in_channels": 1e999}')),
    Damage("unet class", ("UNet3D",), config("unet", _class_name="UNet3DConditionModel")),
    Damage("vae class", ("AutoencoderDC",), config("vae_decoder", _class_name="AutoencoderDC")),
    Damage("class a list", ("config.json",), config("unet", _class_name=["x"])),
    Damage("channels text", ("in_channels",), config("unet", in_channels="4")),
    Damage("channels true", ("in_channels",), config("unet", in_channels=True)),
    Damage("channels 1e9", ("in_channels",), config("unet", in_channels=10**9)),
    Damage("channels apart", ("channels",), config("unet", in_channels=16, out_channels=16)),
    Damage("inpainting that lies", ("in_channels is 9",), config("unet", in_channels=9)),
    Damage("latents scaled", ("latents_mean",), config("vae_decoder", latents_mean=[0, 0, 0, 0])),
    Damage("guidance input", ("timestep_cond",), config("unet", time_cond_proj_dim=256)),
    Damage("guidance width", ("time_cond_proj_dim",), config("unet", time_cond_proj_dim=-1)),
    Damage("out channels", ("out_channels",), config("unet", out_channels=8)),
    Damage(
        "graph channels",
        ("in_channels is 16", "openvino_model.xml"),
        lambda f: (
            config("vae_decoder", latent_channels=16)(f),
            config("unet", in_channels=16, out_channels=16)(f),
        ),
    ),
    Damage("text width", ("cross_attention_dim",), config("unet", cross_attention_dim=999)),
    Damage("scaling 0", ("scaling_factor",), config("vae_decoder", scaling_factor=0)),
    Damage("scaling text", ("scaling_factor",), config("vae_decoder", scaling_factor="x")),
    Damage("shift text", ("shift_factor",), config("vae_decoder", shift_factor="x")),
    Damage("vae levels", ("block_out_channels",), config("vae_decoder", block_out_channels=[])),
    Damage("native size", ("sample_size",), config("unet", sample_size=10**6)),
    Damage(
        "no scheduler",
        ("scheduler/scheduler_config.json",),
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    ),
    Damage(
        "no tokenizer", ("tokenizer",), lambda f: (f / "tokenizer").rename(f.parent / "tokenizer")
    ),
    Damage("manifest", ("sdvino.json",), text("sdvino.json", '{"format_version": 99}')),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_what_is_refused(damage: Damage, folder: Path) -> None:
    damage.do(folder)
    message = refused(folder)
    for word in damage.words:
        assert word in message


def test_what_is_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none")
    assert "not a folder" in refused(Path(__file__))
    assert "model_index.json" in refused(tmp_path)
    refused(tmp_path / ("x" * 300))


def test_a_config_that_is_too_large(folder: Path) -> None:
    (folder / "unet" / "config.json").write_bytes(b" " * (4 * 2**20 + 1))
    assert "4 MB" in refused(folder)


def link(target: Path, place: Path) -> None:
    try:
        place.symlink_to(target)
    except OSError:
        pytest.skip("this system does not let us make links")


@pytest.mark.parametrize("file", [UNET_BIN, "model_index.json", "tokenizer/tokenizer.json"])
def test_links_out_of_the_folder_are_refused(file: str, folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / file).rename(outside)
    link(outside, folder / file)
    message = refused(folder)
    assert "outside the model folder" in message
    assert file in message


def test_the_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "sdvino.json").unlink()
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(f for f in snapshot.rglob("*") if f.is_file()):
        file.rename(blobs / str(number))
        link(blobs / str(number), file)
    assert ModelFolder.open(snapshot).name == "owner/name"


def test_verify_finds_a_changed_byte(folder: Path) -> None:
    model = ModelFolder.open(folder)
    assert model.verify().files >= 3 * len(model.components)
    weights = folder / UNET_BIN
    content = bytearray(weights.read_bytes())
    content[7] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"unet/openvino_model\.bin.*SHA-256"):
        ModelFolder.open(folder).verify()
    weights.unlink()
    with pytest.raises(ModelFolderError, match="missing"):
        model.verify()


def test_verify_does_not_pass_where_nothing_is_compared(folder: Path) -> None:
    manifest = json.loads((folder / "sdvino.json").read_text())
    for component in manifest["components"].values():
        component["sha256"] = {}
    (folder / "sdvino.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match="does not list"):
        ModelFolder.open(folder).verify()
    (folder / "sdvino.json").unlink()
    with pytest.raises(ModelFolderError, match="nothing to compare"):
        ModelFolder.open(folder).verify()


def test_files_of_another_size_than_the_manifest_says_are_refused(folder: Path) -> None:
    with (folder / UNET_BIN).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelFolderError, match=r"unet have .* bytes together"):
        ModelFolder.open(folder)


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("ir")) / "unet"


@settings(max_examples=80, deadline=None)
@given(cut=st.floats(0, 1), noise=st.binary(max_size=20), dropped=st.integers(0, 60))
def test_a_damaged_ir_is_refused_or_read(ir: Path, cut: float, noise: bytes, dropped: int) -> None:
    raw = (ir / "openvino_model.xml").read_bytes()
    start = int(cut * len(raw))
    xml = ir / "damaged.xml"
    xml.write_bytes(raw[:start] + noise + raw[start + dropped :])
    size = (ir / "openvino_model.bin").stat().st_size
    # Whatever else is wrong with it, nothing but our own exception comes out.
    with contextlib.suppress(ModelFolderError):
        assert summarize_ir(xml, ir / "openvino_model.bin", "unet").weights_end <= size


MANIFEST = Manifest(
    source="shapes",
    family="sd1",
    recipe="int8",
    components={"unet": ManifestComponent(precision="int8", bytes=3, sha256={"a.bin": "0" * 64})},
    quality={"psnr": 35.5},
    suggested=Suggested(num_inference_steps=20, guidance_scale=4.0, scheduler="euler"),
    target="avx2-vnni",
    versions={"openvino": "2026.4.1"},
)


def test_a_manifest_goes_there_and_back() -> None:
    assert Manifest.from_dict(json.loads(MANIFEST.to_json())) == MANIFEST


def test_a_manifest_may_hold_what_we_do_not_know() -> None:
    value = {**MANIFEST.to_dict(), "colour": "blue"}
    value["suggested"]["height"] = 512
    assert Manifest.from_dict(value) == MANIFEST


def test_a_manifest_needs_little() -> None:
    manifest = Manifest.from_dict(
        {"format_version": 1, "source": "x", "family": "sd1", "recipe": "fp16", "components": {}}
    )
    assert manifest.suggested == Suggested()
    assert manifest.quality is None


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("format_version", 2, "update sdvino"),
        ("format_version", True, "format_version"),
        ("source", 7, "source"),
        ("recipe", None, "recipe"),
        ("components", [], "components"),
        ("components", {"../unet": {}}, "component"),
        ("components", {"unet": 3}, "unet"),
        ("components", {"unet": {"precision": "int8", "bytes": 1, "sha256": {"../a": ""}}}, "file"),
        ("components", {"unet": {"precision": "x", "bytes": 1, "sha256": {"a": "zz"}}}, "SHA-256"),
        ("components", {"unet": {"precision": "x", "bytes": -1, "sha256": {}}}, "bytes"),
        ("quality", 3, "quality"),
        ("suggested", [], "suggested"),
        ("suggested", {"num_inference_steps": 0}, "steps"),
        ("suggested", {"num_inference_steps": 2.5}, "num_inference_steps"),
        ("suggested", {"guidance_scale": "7"}, "guidance_scale"),
        ("suggested", {"guidance_scale": 1e6}, "guidance_scale"),
        ("suggested", {"scheduler": "magic"}, "magic"),
        ("target", 3, "target"),
        ("versions", [], "versions"),
    ],
)
def test_a_manifest_that_lies(key: str, value: Any, word: str) -> None:
    with pytest.raises(ModelFolderError, match=word):
        Manifest.from_dict({**MANIFEST.to_dict(), key: value})


def test_looking_at_a_folder_does_not_load_openvino(folder: Path) -> None:
    code = (
        "import sys; from sdvino.folder.index import ModelFolder;"
        f"ModelFolder.open({str(folder)!r}); sys.exit('openvino' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
