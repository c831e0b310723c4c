"""Folders of Stable Diffusion XL's layout, of LCM and for inpainting: what is read and refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov
import pytest

from sdvino import StableDiffusionPipeline
from sdvino.errors import ModelFolderError
from sdvino.folder.index import ModelFolder
from sdvino.runtime.memory import held_bytes
from sdvino.runtime.memory_plan import measure_parts
from tests.tiny_folder import (
    POOLED,
    SIZE_WIDTH,
    WIDTHS,
    edit_json,
    make_tiny_folder,
    make_tiny_xl_folder,
    xl_text_encoder,
    xl_unet,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_xl_folder(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "model")


def test_a_folder_with_two_text_encoders(folder: Path) -> None:
    model = ModelFolder.open(folder)
    assert list(model.components) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    assert model.cross_attention_dim == sum(WIDTHS)
    assert model.pooled_width == POOLED
    assert model.guidance_width is None
    assert model.kind.text_encoders == ("text_encoder", "text_encoder_2")
    assert model.refusal is None


def test_zeros_for_an_empty_prompt_are_the_index_s_choice(folder: Path) -> None:
    assert ModelFolder.open(folder).zeros_for_empty_prompt
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not ModelFolder.open(folder).zeros_for_empty_prompt
    plain = make_tiny_folder(folder.parent / "plain")
    assert not ModelFolder.open(plain).zeros_for_empty_prompt


@pytest.mark.parametrize("name", ["OVStableDiffusionXLPipeline", "StableDiffusionXLPipeline"])
def test_optimums_name_and_diffusers_name(name: str, folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name=name)
    assert ModelFolder.open(folder).kind.added_conditions


def test_memory_counts_the_second_text_encoder(folder: Path) -> None:
    model = ModelFolder.open(folder)
    both = measure_parts(model, 128, 128).text
    assert both == held_bytes(model, "text_encoder") + held_bytes(model, "text_encoder_2")
    assert both > held_bytes(model, "text_encoder")


@dataclass(frozen=True)
class Damage:
    name: str
    words: tuple[str, ...]
    do: Callable[[Path], object]


def config(part: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / part / "config.json", **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def graph(part: str, model: Callable[[], ov.Model]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        ov.save_model(model(), folder / part / "openvino_model.xml", compress_to_fp16=False)

    return do


def plain_unet(folder: Path) -> None:
    """A UNet without pooled state and sizes under the name of Stable Diffusion XL."""
    plain = make_tiny_folder(folder.parent / "plain")
    for file in ("openvino_model.xml", "openvino_model.bin"):
        shutil.copy(plain / "unet" / file, folder / "unet" / file)


def plainly_named(folder: Path) -> None:
    """All but the name and the width of a plain model: the UNet wants more than that one gives."""
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    edit_json(folder / "text_encoder" / "config.json", hidden_size=sum(WIDTHS))


DAMAGES = [
    Damage("no second encoder", ("text_encoder_2",), remove("text_encoder_2")),
    Damage("no first encoder", ("text_encoder/",), remove("text_encoder")),
    Damage("no second tokenizer", ("tokenizer_2",), remove("tokenizer_2")),
    Damage(
        "second encoder cut",
        ("text_encoder_2", "missing"),
        lambda f: (f / "text_encoder_2" / "openvino_model.bin").unlink(),
    ),
    Damage("widths", ("cross_attention_dim is 48", "49"), config("text_encoder_2", hidden_size=17)),
    Damage("width text", ("hidden_size",), config("text_encoder_2", hidden_size="16")),
    Damage("width null", ("hidden_size",), config("text_encoder", hidden_size=None)),
    Damage(
        "pooled",
        ("projection_dim is 99", "text_embeds"),
        config("text_encoder_2", projection_dim=99),
    ),
    Damage("pooled 1e9", ("projection_dim",), config("text_encoder_2", projection_dim=10**9)),
    Damage("pooled null", ("projection_dim",), config("text_encoder_2", projection_dim=None)),
    Damage(
        "embedding of sizes",
        ("projection_class_embeddings_input_dim",),
        config("unet", addition_time_embed_dim=SIZE_WIDTH + 1),
    ),
    Damage(
        "embedding absurd",
        ("addition_time_embed_dim",),
        config("unet", addition_time_embed_dim=[]),
    ),
    Damage("lengths", ("reads 64 tokens",), config("text_encoder_2", max_position_embeddings=64)),
    Damage("refiner", ("time_ids", "refiner"), graph("unet", lambda: xl_unet(times=5))),
    Damage("no added inputs", ("Stable Diffusion XL", "text_embeds"), plain_unet),
    Damage(
        "named otherwise",
        ("cross_attention_dim",),
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
    ),
    Damage(
        "added inputs in a plain model",
        ("wants an input", "sdvino does not"),
        plainly_named,
    ),
    Damage(
        "second encoder's ids",
        ("text_encoder_2", "input_ids"),
        graph("text_encoder_2", lambda: xl_unet()),
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_what_is_refused(damage: Damage, folder: Path) -> None:
    damage.do(folder)
    with pytest.raises(ModelFolderError) as caught:
        ModelFolder.open(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    for word in damage.words:
        assert word in message


def test_models_for_inpainting_are_read_and_not_run(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    edit_json(folder / "unet" / "config.json", in_channels=9)
    graph("unet", lambda: xl_unet(channels=9))(folder)
    assert ModelFolder.open(folder).in_channels == 9
    with pytest.raises(ModelFolderError, match="inpainting"):
        StableDiffusionPipeline.from_pretrained(folder)


def test_a_second_encoder_without_a_pooled_state_is_named(folder: Path) -> None:
    graph("text_encoder_2", lambda: xl_text_encoder(WIDTHS[1], None))(folder)
    components = StableDiffusionPipeline(ModelFolder.open(folder)).components
    with pytest.raises(ModelFolderError, match="text_embeds"):
        components.text_encoder("text_encoder_2", [1])
