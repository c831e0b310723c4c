"""What the fuzzer damages: healthy models, a checkpoint, a cache; made once a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle"
#: What the metadata of the pictures says.
PARAMETERS = (
    "a red circle, (soft:1.2)\nNegative prompt: blurry, text\nSteps: 1, Sampler: DPM++ 2M,"
    " Schedule type: Karras, CFG scale: 3, Seed: 1, Size: 64x64, Model hash: 0123456789,"
    ' Model: tiny, RNG: CPU, Clip skip: 1, Lora hashes: "a: 1, b: 2", Version: v1.9.0'
)
DRAW = ("--steps", "1", "-W", "64", "-H", "64", "-q", "--seed", "1")
#: What manifests of other models hold, beside what that of the tiny one does.
_MANIFEST: Mapping[str, Any] = {
    "quality": {
        "passed": True,
        "measured": {"median_psnr": 33.1, "median_ssim": 0.97},
        "note": "a note",
        "trained": True,
    },
    "baked": {"loras": [{"name": "style", "weight": 0.5}], "vae": "other"},
    "passes": [{"kind": "prune", "component": "unet", "what": "heads", "figures": {"note": "a"}}],
    "target": "avx2",
    "versions": {"sdvino": "0.1.0", "openvino": "2026.4.1"},
}
_BOMB = "fuzz_bomb"
#: diffusers' names -> those of the original files.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_shortcut": "nin_shortcut",
    "samplers.0.": "sample.",
    ".resnets.": ".block.",
}


@dataclass(frozen=True, slots=True)
class Templates:
    """Healthy files and folders, never changed: inputs are copies."""

    #: The folder that `make` has filled.
    made: Path
    shapes: Path = ROOT / "models" / "shapes"
    source: Path = ROOT / "models" / "shapes-source"

    @property
    def tiny(self) -> Path:
        """A model folder of a few nodes, which draws in a tenth of a second."""
        return self.made / "tiny"

    @property
    def bomb(self) -> Path:
        """The same with a Broadcast whose shape stands in the weights, see `bomb_offset`."""
        return self.made / "bomb"

    @property
    def cache(self) -> Path:
        """A cache folder in which `tiny` is compiled and tuned."""
        return self.made / "cache"

    @property
    def checkpoint(self) -> Path:
        """The source as a single file in the original naming."""
        return self.made / "checkpoint.safetensors"


def make(folder: Path) -> None:
    """Fill ``folder``; runs sdvino and OpenVINO, and so belongs into a child process."""
    from sdvino.cli.main import main
    from tests.tiny_folder import finish, make_tiny_folder, save, vae_decoder

    made = Templates(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for target in (made.tiny, made.bomb):
        make_tiny_folder(target)
        shutil.rmtree(target / "tokenizer")
        shutil.copytree(made.shapes / "tokenizer", target / "tokenizer")
    manifest = made.tiny / "sdvino.json"
    value = {**json.loads(manifest.read_text(encoding="utf-8")), **_MANIFEST}
    manifest.write_text(json.dumps(value), encoding="utf-8")
    config = json.loads((made.bomb / "vae_decoder" / "config.json").read_text(encoding="utf-8"))
    model = _with_broadcast(vae_decoder(), finish)
    save(model, made.bomb / "vae_decoder", config)
    (made.bomb / "sdvino.json").unlink()
    write_safetensors(made.checkpoint, original_naming(made.source))
    os.environ["SDVINO_CACHE_DIR"] = str(made.cache)
    for arguments in (
        ("generate", PROMPT, "-m", str(made.tiny), *DRAW, "-o", str(folder / "x.png")),
        ("tune", "-m", str(made.tiny), "--minutes", "0.01", "-q"),
        ("generate", "--like", str(folder / "x.png"), "-o", str(folder / "y.png"), "-q"),
        ("info", str(folder / "x.png")),
        ("info", "--verify", str(made.tiny)),
        ("devices",),
        ("bench", "-m", str(made.tiny), "--steps", "1", "-n", "1", "--size", "64", "-q"),
        ("convert", str(made.source), str(folder / "out"), "--dry-run"),
    ):
        # Whether they succeed is for the inputs of number 0 to say; what they import counts here.
        main(arguments)


def _with_broadcast(model: Any, finish: Any) -> Any:
    """Return the decoder with a sum over a Broadcast added, which is zero and folds."""
    import numpy as np
    from openvino import opset13 as ops

    shape = ops.constant(np.array([1, 3, 2, 2], np.int64), name=_BOMB)
    zeros = ops.broadcast(ops.constant(np.float32(0.0)), shape)
    added = ops.reduce_max(zeros, np.array([0, 1, 2, 3], np.int64))
    node = model.outputs[0].get_node().input_value(0)
    return finish(ops.add(node, added), "sample", model.get_parameters())


def bomb_offset(xml: str) -> int:
    """Return where in the weights the four numbers of the Broadcast's shape are."""
    found = re.search(rf'name="{_BOMB}".*?offset="(\d+)"', xml, re.DOTALL)
    assert found is not None
    return int(found[1])


def read_safetensors(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Yield name, entry of the header and bytes of each tensor."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, entry, content[start + first : start + last]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, list[int], bytes]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write dtype, shape and bytes of each tensor."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    place = 0
    for name, (dtype, shape, body) in tensors.items():
        end = place + len(body)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    bodies = b"".join(body for _, _, body in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + bodies)


def original_naming(source: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return the tensors of a diffusers folder of Stable Diffusion 1.x as LDM calls them."""
    unet, vae = (
        json.loads((source / part / "config.json").read_text(encoding="utf-8"))
        for part in ("unet", "vae")
    )
    last = len(vae["block_out_channels"]) - 1
    found = {}
    for part in ("unet", "vae", "text_encoder"):
        for file in sorted((source / part).glob("*.safetensors")):
            for name, entry, body in read_safetensors(file):
                shape = entry["shape"]
                if part == "unet":
                    new = f"model.diffusion_model.{_unet_name(name, unet)}"
                elif part == "vae":
                    new = f"first_stage_model.{_vae_name(name, last)}"
                    shape = [*shape, 1, 1] if "attentions" in name and len(shape) == 2 else shape
                else:
                    new = f"cond_stage_model.transformer.{name}"
                found[new] = (entry["dtype"], shape, body)
    return found


def _unet_name(name: str, config: Mapping[str, Any]) -> str:
    part, _, kind = name.rpartition(".")
    if part in _UNET_ENDS:
        return f"{_UNET_ENDS[part]}.{kind}"
    step = config["layers_per_block"] + 1
    middle = re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", name)
    if middle is not None:
        if middle[1] == "attentions":
            return f"middle_block.1.{middle[3]}"
        return f"middle_block.{2 * int(middle[2])}.{_resnet(middle[3])}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert block is not None, name
    way, level, what, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    if what == "downsamplers":
        return f"input_blocks.{(level + 1) * step}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{level * step + step - 1}.{2 if attends else 1}.{rest}"
    number = level * step + layer
    place = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    return f"{place}.1.{rest}" if what == "attentions" else f"{place}.0.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{_RESNET[part]}.{kind}"


def _vae_name(name: str, last: int) -> str:
    for old, new in _VAE.items():
        name = name.replace(old, new)
    name = name.replace("down_blocks.", "down.")
    return re.sub(r"up_blocks\.(\d)", lambda found: f"up.{last - int(found[1])}", name)
