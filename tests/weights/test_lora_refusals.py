"""LoRA files and arguments that are refused, each with a sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdvino.errors import RequestError
from sdvino.weights.lora import open_lora, parse_lora
from tests.weights.lora_files import save

GOOD = {
    "lora_unet_conv_in.lora_down.weight": np.zeros((4, 4, 3, 3), np.float32),
    "lora_unet_conv_in.lora_up.weight": np.zeros((16, 4, 1, 1), np.float32),
    "lora_unet_conv_in.alpha": np.float32(4),
}


def with_tensor(name: str, value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = {**GOOD, f"lora_unet_conv_in.{name}": value}
        save(path, {key: torch.tensor(item) for key, item in tensors.items()})

    return write


def only(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    return lambda path: void(save(path, tensors, metadata))


def void(_: object) -> None:
    return None


def good_bytes(path: Path) -> bytes:
    with_tensor("alpha", np.float32(4))(path)
    return path.read_bytes()


def header_edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        raw = good_bytes(path)
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return write


DOWN = "lora_unet_conv_in.lora_down.weight"
NAN = np.full((4, 4, 3, 3), np.nan, np.float32)
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: void(path.write_bytes(b"")), "damaged"),
    "text": (lambda path: void(path.write_text("hello" * 100)), "damaged"),
    "cut": (lambda path: void(path.write_bytes(good_bytes(path)[:-8])), "damaged"),
    "too long": (lambda path: void(path.write_bytes(good_bytes(path) + b"12345678")), "damaged"),
    "header only": (lambda path: void(path.write_bytes(good_bytes(path)[:40])), "damaged"),
    "huge header": (
        lambda path: void(path.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
        "damaged",
    ),
    "lying shape": (header_edit(lambda h: h[DOWN].update(shape=[4, 4, 3, 300])), "damaged"),
    "lying offsets": (
        header_edit(lambda h: h[DOWN].update(data_offsets=[0, 2**40])),
        "damaged",
    ),
    "nothing in it": (only({}), "empty"),
    "no LoRA": (only({"unet.conv_in.weight": torch.zeros(2)}), "holds no LoRA"),
    "half a LoHa": (only({"lora_unet_a.hada_w1_a": torch.zeros(2, 2)}), "holds no LoRA"),
    "half a LoKr": (only({"lora_unet_a.lokr_w1": torch.zeros(2, 2)}), "holds no LoRA"),
    "a LoHa of two sizes": (
        only(
            {
                f"lora_unet_a.hada_w{i}_{half}": torch.zeros(shape)
                for i in (1, 2)
                for half, shape in (("a", (4, 2)), ("b", (2, 4 * i)))
            }
        ),
        "can be",
    ),
    "a LoKr of vectors": (
        only({f"lora_unet_a.lokr_w{i}": torch.zeros(2) for i in (1, 2)}),
        "can be",
    ),
    "half of a pair": (only({DOWN: torch.zeros(4, 4, 3, 3)}), "holds no LoRA"),
    "NaN": (with_tensor("lora_down.weight", NAN), "NaN or infinity"),
    "infinity": (
        with_tensor("lora_up.weight", np.full((16, 4, 1, 1), np.inf, np.float16)),
        "NaN or infinity",
    ),
    "NaN alpha": (with_tensor("alpha", np.float32("nan")), "scales"),
    "alpha of two": (with_tensor("alpha", np.zeros(2, np.float32)), "more than one number"),
    "whole numbers": (with_tensor("lora_down.weight", np.zeros((4, 4, 3, 3), np.int8)), "I8"),
    "ranks differ": (with_tensor("lora_up.weight", np.zeros((16, 5, 1, 1), np.float32)), "can be"),
    "a vector": (with_tensor("lora_down.weight", np.zeros(4, np.float32)), "can be"),
    "a scalar": (with_tensor("lora_down.weight", np.float32(4)), "can be"),
    "no rank": (with_tensor("lora_down.weight", np.zeros((0, 4, 3, 3), np.float32)), "can be"),
    "a wide middle": (with_tensor("lora_mid.weight", np.zeros((4, 5, 3, 3), np.float32)), "can be"),
    "broken metadata": (
        only(
            {name: torch.zeros(4, 4) for name in ("unet.a.lora_A.weight", "unet.a.lora_B.weight")},
            {"lora_adapter_metadata": "{"},
        ),
        "metadata",
    ),
    "words for alpha": (
        only(
            {name: torch.zeros(4, 4) for name in ("unet.a.lora_A.weight", "unet.a.lora_B.weight")},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'},
        ),
        "lora_alpha",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_a_sentence(tmp_path: Path, case: str) -> None:
    write, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(RequestError, match=words) as caught:
        open_lora(path)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match="pickle"):
        open_lora(path)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:.5", "a.safetensors", 0.5),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("a.safetensors:0", "a.safetensors", 0.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.8", r"C:\loras\a.safetensors", 0.8),
        ("C:/loras/a.safetensors:2", "C:/loras/a.safetensors", 2.0),
        ("with:colon.safetensors", "with:colon.safetensors", 1.0),
        ("missing.safetensors:nan", "missing.safetensors:nan", 1.0),
    ],
)
def test_the_weight_stands_behind_the_last_colon(text: str, path: str, weight: float) -> None:
    assert parse_lora(text) == (Path(path), weight)


def test_a_file_whose_name_ends_like_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "a:0.5"
    try:
        path.touch()
    except OSError:
        pytest.skip("no such names here")
    assert parse_lora(str(path)) == (path, 1.0)


@pytest.mark.parametrize("weight", ["nan", "inf", "1e9", "-101", "strong", ""])
def test_weights_that_are_none_are_refused(tmp_path: Path, weight: str) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    with pytest.raises(RequestError, match="weight"):
        parse_lora(f"{path}:{weight}")
