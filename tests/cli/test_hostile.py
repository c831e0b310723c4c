"""What a stranger's folder, file or word does through the real command: a sentence, no more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdvino.cli.main import main
from tests.conftest import SHAPES, SHAPES_SOURCE

if sys.platform == "win32":
    pytest.skip("files and signals of POSIX", allow_module_level=True)

HUGE = "1" + "0" * 400
CONSTANT = '<data element_type="f16" shape="4, 4, 1, 1" offset="0" size="32" />'
IR = "vae_decoder/openvino_model.xml"
LORA = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def said(file: str, key: str, literal: str) -> Callable[[Path], None]:
    """Put ``literal`` into a JSON file, which Python would not write so."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        value[key] = "@@"
        (folder / file).write_text(json.dumps(value).replace('"@@"', literal))

    return damage


def replaced(file: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return damage


def written(file: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_text(content)

    return damage


def fifo(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def loop(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(Path(file).name)

    return damage


@dataclass(frozen=True)
class Case:
    """A command that ends with 2 and these words, and what is done to a copy of the demo first."""

    command: tuple[str, ...]
    words: str
    damage: Callable[[Path], None] = lambda folder: None


INFO, DRAW = ("info", "MODEL"), ("generate", "x", "-m", "MODEL", "-o", "OUT.png")
CASES: dict[str, Case] = {
    "an element type that crashes": Case(
        INFO,
        "'u1'",
        replaced(IR, CONSTANT, CONSTANT.replace("f16", "u1").replace('"32"', '"2"')),
    ),
    "another that does": Case(
        INFO, "'nf4'", replaced(IR, CONSTANT, CONSTANT.replace("f16", "nf4"))
    ),
    "weights of a terabyte": Case(
        INFO,
        "its graph names",
        lambda folder: os.truncate(folder / "unet/openvino_model.bin", 2**40),
    ),
    "a vocabulary of a terabyte": Case(
        (*INFO, "--verify"),
        "over 64 MB",
        lambda folder: os.truncate(folder / "tokenizer/merges.txt", 2**40),
    ),
    "a comment of tags": Case(
        INFO, "not an OpenVINO", replaced(IR, "<layers>", f"<!-- {'<layer ' * 60_000}--><layers>")
    ),
    "CDATA": Case(INFO, "not an OpenVINO", replaced(IR, "<layers>", "<layers><![CDATA[<data]]>")),
    "another encoding": Case(
        INFO,
        "not an OpenVINO",
        replaced(IR, '<?xml version="1.0"?>', '<?xml version="1.0" encoding="latin-1"?>'),
    ),
    "inputs without end": Case(
        INFO,
        "inputs",
        written(IR, "<net><layers>" + '<layer type="Parameter"/>' * 20_000 + "</layers></net>"),
    ),
    "places that are none": Case(
        INFO, "nonsense", replaced(IR, 'offset="0" size="32"', f'offset="0" size="{HUGE}"')
    ),
    **{
        f"a FIFO for {file}": Case(DRAW, "no ordinary file", fifo(file))
        for file in (
            "model_index.json",
            "unet/openvino_model.xml",
            "unet/openvino_model.bin",
            "tokenizer/special_tokens_map.json",
        )
    },
    **{
        f"a huge {key}": Case(DRAW, "too large", said(file, key, literal))
        for file, key, literal in (
            ("vae_decoder/config.json", "scaling_factor", HUGE),
            ("sdvino.json", "suggested", f'{{"guidance_scale": {HUGE}}}'),
            ("sdvino.json", "quality", f'{{"measured": {{"median_psnr": {HUGE}}}}}'),
            ("scheduler/scheduler_config.json", "lambda_min_clipped", f"-{HUGE}"),
        )
    },
    **{
        f"a loop at {file}": Case(INFO, "cannot be read", loop(file))
        for file in ("sdvino.json", "unet/openvino_model.bin", "unet/config.json")
    },
    "nobody's home": Case(("info", "~nosuchuser"), "home folder"),
    "nobody's model": Case(("generate", "x", "-m", "~nosuchuser/x"), "home folder"),
    "a long name": Case(("info", "x" * 300 + ".png"), "no name"),
    "a long output": Case(("generate", "x", "-o", "x" * 300 + ".png"), "no name"),
    "a device of prompts": Case(("generate", "--prompts", "/dev/zero"), "no ordinary file"),
    "a device of settings": Case(("generate", "--like", "/dev/zero"), "no ordinary file"),
    "escapes in an option": Case(("info", "--\x1b[2J"), "\\x1b[2J"),
}


def run(
    command: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int = 2
) -> str:
    """Run the command; return what it wrote, which holds no control characters."""
    places = {"MODEL": tmp_path / "model", "OUT": tmp_path / "out", "TMP": tmp_path}
    words = list(command)
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    found = main(words)
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert found == status, text
    assert "unexpected error" not in text
    assert "\x1b" not in text
    assert len(captured.err) < 4000
    return text


@pytest.mark.parametrize("name", CASES)
def test_a_sentence(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    if "MODEL" in " ".join(case.command):
        shutil.copytree(SHAPES, tmp_path / "model")
        case.damage(tmp_path / "model")
    started = time.monotonic()
    assert case.words in run(case.command, tmp_path, capfd)
    assert time.monotonic() - started < 20  # those that hung did for minutes
    assert not (tmp_path / "out.png").exists()


def tensors(path: Path, header: dict[str, Any], size: int = 8) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


RECIPES = {
    "names of many parts": ".".join(["a"] * 50_000) + " = 1",
    "prompts from a device": '[calibration]\nprompts_file = "/dev/zero"',
    "prompts from outside": '[calibration]\nprompts_file = "../secret.txt"',
    "digits": '[unet]\nmode = "int8"\nbits = ' + "9" * 5000,
    "parentheses": "[unet]\nmode = 'int8-weights'\nfloat_layers = ['" + "(" * 5000 + "']",
    "a repeat": "[unet]\nmode = 'int8-weights'\nfloat_layers = ['a{99999999999999999999}']",
    "a slow pattern": "[unet]\nmode = 'int8-weights'\nfloat_layers = ['(a+)+$']",
    "a huge ratio": '[unet]\nmode = "int4-weights"\nratio = ' + "9" * 400,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "r.toml").write_text(RECIPES[name])
    (tmp_path / "secret.txt").write_text("SECRET")
    command = ("convert", str(SHAPES_SOURCE), "OUT", "--dry-run", "--recipe", "TMP/recipes/r.toml")
    assert "SECRET" not in run(command, tmp_path, capfd)


def test_checkpoints_and_loras(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors(
        tmp_path / "a.safetensors", {"a": {"dtype": ["F16"], "shape": [4], "data_offsets": [0, 8]}}
    )
    assert "unknown type" in run(
        ("convert", "TMP/a.safetensors", "OUT", "--dry-run"), tmp_path, capfd
    )
    metadata = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {HUGE}}}'}
    half = {"dtype": "F16", "shape": [4, 64], "data_offsets": [0, 512]}
    tensors(
        tmp_path / "lora.safetensors",
        {
            "__metadata__": metadata,
            f"{LORA}.lora_A.weight": half,
            f"{LORA}.lora_B.weight": {**half, "shape": [64, 4], "data_offsets": [512, 1024]},
        },
        1024,
    )
    lora = ("convert", str(SHAPES_SOURCE), "OUT", "--dry-run", "--lora", "TMP/lora.safetensors")
    assert "too large" in run(lora, tmp_path, capfd)


def test_an_index_that_lists_lists(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SHAPES_SOURCE, tmp_path / "model")
    index = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": ["x"]}}')
    assert "lists; download" in run(("convert", "MODEL", "OUT", "--dry-run"), tmp_path, capfd)


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "calibration_prompts.txt"])
def test_a_source_with_links_to_outside_is_refused(
    file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHAPES_SOURCE, tmp_path / "model")
    (tmp_path / "secret.json").write_text('{"token": "SECRET"}')
    (tmp_path / "model" / file).unlink(missing_ok=True)
    (tmp_path / "model" / file).symlink_to(tmp_path / "secret.json")
    for more in ((), ("--dry-run",)):
        text = run(
            ("convert", "MODEL", "OUT", "--recipe", "fp16", "--no-gate", *more), tmp_path, capfd
        )
        assert f"{file} is a link" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret.json"]


def test_prompts_without_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_bytes(b"a\n" * 1_990_000)
    command = ("generate", "--prompts", "TMP/list.txt", "-n", "10000", "--seed", "1")
    assert "100,000" in run(command, tmp_path, capfd)


def test_escapes_in_a_manifest_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SHAPES, tmp_path / "model")
    edit = {"source": "\x1b]0;owned\x07\x1b[2J\nverified: all", "recipe": "\x9b31mx"}
    path = tmp_path / "model" / "sdvino.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    text = run(INFO, tmp_path, capfd, status=0)
    assert "name: \\x1b]0;owned\\x07\\x1b[2J\\x0averified: all\n" in text
    assert "\\x9b31mx" in text


def flip(folder: Path) -> None:
    """Change weights, at the same size, and at the same time of the last change."""
    path = folder / "unet" / "openvino_model.bin"
    told = path.stat()
    content = bytearray(path.read_bytes())
    content[2_000_000:2_000_064] = b"\x55" * 64
    path.write_bytes(content)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


def test_weights_that_are_not_the_manifests_draw_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHAPES, tmp_path / "model")
    draw = (*DRAW, "--steps", "1", "-W", "64", "-H", "64", "--overwrite")
    run(draw, tmp_path, capfd, status=0)
    (tmp_path / "out.png").unlink()
    flip(tmp_path / "model")
    assert "unet/openvino_model.bin is not the file" in run(draw, tmp_path, capfd)
    assert not (tmp_path / "out.png").exists()
    assert "SHA-256" in run((*INFO, "--verify"), tmp_path, capfd)
    (tmp_path / "model" / "sdvino.json").unlink()
    run(draw, tmp_path, capfd, status=0)
    assert "nothing to compare" in run((*INFO, "--verify"), tmp_path, capfd)


def test_verify_says_what_it_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = run(("info", "--verify"), tmp_path, capfd, status=0)
    assert "verified: " in text
    assert "are as sdvino.json lists them" in text


ENDED = """
import os, signal, sys, threading
from sdvino.cli import main as cli
def command(*_, **__):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.Signals[sys.argv[1]])).start()
    threading.Event().wait(20)
cli.cli.main = command
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_the_command_in_a_sentence(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED, name],
        capture_output=True,
        text=True,
        check=False,
        cwd=SHAPES.parent.parent,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (
        130,
        "sdvino: Cancelled; nothing was left half-written.\n",
    )


def test_without_a_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("SDVINO_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert "No home folder is known" in run(("devices",), tmp_path, capfd)
