"""What bad input gets, through the real command: one sentence, exit 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdvino.cli.main import main
from tests.conftest import SHAPES


@dataclass(frozen=True)
class Bad:
    """A command line, words that its message must hold, and what to do to the folder first."""

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    damage: Callable[[Path], None] | None = None


def edit_json(file: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps(content))

    return damage


def truncate(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / file
        os.truncate(path, path.stat().st_size // 2)

    return damage


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def inpainting(folder: Path) -> None:
    """Make the UNet one that takes a mask and a picture beside the latents."""
    edit_json("unet/config.json", in_channels=9)(folder)
    (folder / "sdvino.json").unlink()  # which says how long those files are
    xml = folder / "unet" / "openvino_model.xml"
    text = xml.read_text(encoding="utf-8")
    assert text.count('shape="?,4,?,?"') == 1
    xml.write_text(text.replace('shape="?,4,?,?"', 'shape="?,9,?,?"'), encoding="utf-8")


def write(file: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_text(content)

    return damage


def diffusers_folder(folder: Path) -> None:
    for xml in folder.rglob("openvino_model.*"):
        xml.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)


def symlinked_weights(folder: Path) -> None:
    inside = folder / "unet" / "openvino_model.bin"
    outside = folder.parent / "elsewhere.bin"
    inside.rename(outside)
    inside.symlink_to(outside)


GENERATE = ("generate", "a red circle", "--steps", "1", "-m", "MODEL", "-o", "OUT/out.png")
REQUESTS = [
    Bad("steps 0", ("--steps", "0"), ("steps", "1")),
    Bad("steps 5000", ("--steps", "5000"), ("steps", "1000")),
    Bad("steps not a number", ("--steps", "many"), ("steps",)),
    Bad("guidance NaN", ("--guidance-scale", "nan"), ("guidance_scale", "number")),
    Bad("guidance infinite", ("--cfg-scale", "inf"), ("guidance_scale", "number")),
    Bad("guidance negative", ("--guidance-scale", "-1"), ("guidance_scale",)),
    Bad("rescale out of range", ("--guidance-rescale", "2"), ("guidance_rescale",)),
    Bad("eta out of range", ("--eta", "1.5"), ("eta",)),
    Bad("seed too large", ("--seed", str(2**63)), ("seed",)),
    Bad("seed too small", ("--seed", str(-(2**63) - 1)), ("seed",)),
    Bad("seed leaves no room", ("--seed", str(2**63 - 1), "-n", "2"), ("seed", "room")),
    Bad("seed not a number", ("--seed", "lucky"), ("seed",)),
    Bad("unknown scheduler", ("--scheduler", "magic"), ("scheduler", "euler")),
    Bad("unknown device", ("--device", "TPU"), ("TPU", "CPU")),
    Bad("unknown component", ("--device", "brain=CPU"), ("brain", "unet")),
    Bad("component twice", ("--device", "vae=CPU", "--device", "vae=GPU"), ("vae", "twice")),
    Bad("empty device", ("--device", ""), ("device",)),
    Bad("width not in eights", ("-W", "130"), ("width", "130", "8")),
    Bad("height not in eights", ("-H", "7"), ("height",)),
    Bad("absurd size", ("-W", "16384", "-H", "16384"), ("memory",)),
    Bad("more absurd size", ("-W", "800000"), ("width",)),
    Bad("no pictures", ("-n", "0"), ("num_images_per_prompt",)),
    Bad("too many pictures", ("-n", "1000000"), ("num_images_per_prompt",)),
    Bad("threads 0", ("--threads", "0"), ("threads",)),
    Bad("streams -1", ("--streams", "-1"), ("streams",)),
    Bad("clip skip too deep", ("--clip-skip", "90"), ("clip_skip",)),
    Bad("two prompts", ("-p", "another"), ("prompt",)),
    Bad("unknown option", ("--stepz", "4"), ("--stepz",)),
    Bad("unknown picture type", ("-o", "OUT/out.tiff"), (".png",)),
    Bad("output folder missing", ("-o", "OUT/none/out.png"), ("folder",)),
    Bad("output is a folder", ("-o", "OUT"), ("folder",)),
    Bad("like a missing picture", ("--like", "OUT/none.png"), ("none.png",)),
    Bad("a prompt and a file of them", ("--prompts", "OUT/none.txt"), ("prompt", "once")),
    Bad("no such model", ("-m", "OUT/nothing-here"), ("nothing-here",)),
    Bad("a file as model", ("-m", __file__), ("folder",)),
]
FOLDERS = [
    Bad("not a model", (), ("model_index.json",), remove("model_index.json")),
    Bad("a diffusers folder without a VAE", (), ("vae",), diffusers_folder),
    Bad("missing bin", (), ("unet", "missing"), remove("unet/openvino_model.bin")),
    Bad("missing xml", (), ("unet",), remove("unet/openvino_model.xml")),
    Bad("truncated bin", (), ("unet", "truncated"), truncate("unet/openvino_model.bin")),
    Bad("truncated xml", (), ("unet",), truncate("unet/openvino_model.xml")),
    Bad("not an IR", (), ("text_encoder",), write("text_encoder/openvino_model.xml", "<a/>")),
    Bad(
        "entities in the IR",
        (),
        ("vae_decoder",),
        write("vae_decoder/openvino_model.xml", '<!DOCTYPE net [<!ENTITY a "b">]><net>&a;</net>'),
    ),
    Bad("weights outside", (), ("unet", "outside"), symlinked_weights),
    Bad("index not JSON", (), ("model_index.json",), write("model_index.json", "{")),
    Bad("index a list", (), ("model_index.json",), write("model_index.json", "[]")),
    Bad(
        "another pipeline",
        (),
        ("FluxPipeline",),
        edit_json("model_index.json", _class_name="FluxPipeline"),
    ),
    Bad(
        "channels that lie",
        (),
        ("channels",),
        edit_json("unet/config.json", in_channels=16, out_channels=16),
    ),
    Bad("channels as text", (), ("in_channels",), edit_json("unet/config.json", in_channels="4")),
    Bad(
        "text width that lies",
        (),
        ("cross_attention_dim",),
        edit_json("unet/config.json", cross_attention_dim=999),
    ),
    Bad("an inpainting UNet", (), ("inpainting",), inpainting),
    Bad(
        "scaling factor zero",
        (),
        ("scaling_factor",),
        edit_json("vae_decoder/config.json", scaling_factor=0),
    ),
    Bad(
        "betas that are no betas",
        (),
        ("beta",),
        edit_json("scheduler/scheduler_config.json", beta_end="NaN"),
    ),
    Bad(
        "absurd train steps",
        (),
        ("num_train_timesteps",),
        edit_json("scheduler/scheduler_config.json", num_train_timesteps=10**12),
    ),
    Bad(
        "unknown prediction",
        (),
        ("prediction_type",),
        edit_json("scheduler/scheduler_config.json", prediction_type="vibes"),
    ),
    Bad("tokenizer gone", (), ("tokenizer",), lambda folder: shutil.rmtree(folder / "tokenizer")),
]


def run_bad(bad: Bad, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = SHAPES, tmp_path / "out"
    out.mkdir()
    if bad.damage is not None:
        folder = tmp_path / "model"
        shutil.copytree(SHAPES, folder)
        bad.damage(folder)
    arguments = [
        word.replace("MODEL", str(folder)).replace("OUT", str(out))
        for word in (*GENERATE, *bad.arguments)
    ]
    status = main(arguments)
    captured = capfd.readouterr()
    message = captured.err.strip()
    assert status == 2, message
    for word in bad.words:
        assert word.lower() in message.lower(), message
    assert "Traceback" not in message
    assert captured.out == ""
    assert len(message.splitlines()) <= 2 or message.startswith("Usage"), message
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("bad", REQUESTS, ids=lambda bad: bad.name)
def test_a_wrong_request(bad: Bad, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_bad(bad, tmp_path, capfd)


@pytest.mark.parametrize("bad", FOLDERS, ids=lambda bad: bad.name)
def test_a_wrong_folder(bad: Bad, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_bad(bad, tmp_path, capfd)


def test_a_prompt_of_100_kilobytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "word " * 20_000, "-o", str(tmp_path / "out.png")]) == 2
    assert "100,000 characters" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing"),
        (b"", "no prompt"),
        (b"# only a remark\n", "no prompt"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a" * 5_000_000, "over 4 MB"),
    ],
)
def test_a_file_of_prompts(
    content: bytes | None, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.png"
    if content is not None:
        prompts.write_bytes(content)
    assert main(["generate", "--prompts", str(prompts), "-o", str(output)]) == 2
    assert words in capfd.readouterr().err
    assert not output.exists()


def test_no_prompt_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-o", str(tmp_path / "out.png")]) == 2
    assert "There is no prompt" in capfd.readouterr().err
