"""Inputs that are files: models, sources, checkpoints, LoRAs, autoencoders, recipes, prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fuzz_draw import DRY_RUN, FIRST_USE, GENERATE, REAL, Draw, Plan
from fuzz_files import make_fifo
from fuzz_mutate import TEXTS, mutate_xml
from fuzz_templates import DRAW, bomb_offset, read_safetensors, write_safetensors

#: Commands for a model folder, and how often each.
_ON_MODEL = (
    *((GENERATE,) * 5),
    *((("info", "model"),) * 2),
    ("info", "model", "--json"),
    ("info", "model", "--verify"),
    ("convert", "model", "out", "--dry-run"),
)
_RUN_PARTS = ("text_encoder", "unet", "vae_decoder")
_REAL_SHARE = 0.05
_HUGE = (2**14, 2**16, 2**20, 2**31, 2**40, 2**62, -1, 0)
_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_KOHYA = "lora_unet_" + _LAYER.replace(".", "_")
#: File, its tensors down and up, and perhaps alpha: diffusers', kohya's and PEFT's naming.
_LORAS: tuple[tuple[str, str, str, str | None], ...] = (
    ("style.safetensors", f"unet.{_LAYER}.lora_A.weight", f"unet.{_LAYER}.lora_B.weight", None),
    (
        "kohya.safetensors",
        f"{_KOHYA}.lora_down.weight",
        f"{_KOHYA}.lora_up.weight",
        f"{_KOHYA}.alpha",
    ),
    (
        "adapter_model.safetensors",
        f"base_model.model.{_LAYER}.lora_A.weight",
        f"base_model.model.{_LAYER}.lora_B.weight",
        None,
    ),
)
_WEIGHTS = (":0.8", ":-3", ":1e400", ":nan", ":", ":" + "9" * 400, ":0.5:0.5", ":\x1b[2J")
_RECIPES = ("int8", "int8-weights", "int4-weights", "local", "global", "int8-hybrid")
#: Opened as a pickle, it runs a command.
PICKLE = b"cos\nsystem\n(S'touch pickle.ran'\ntR."
_PASSES = """
[calibration]
prompts = ['a red circle', 'a blue ring']
samples = 4

[[passes]]
kind = 'prune'
method = 'heads'
share = 0.2
keep = ['attn2']

[[passes]]
kind = 'distill'
objective = 'recover'
iterations = 2
pictures = '.'
"""
_PROMPT_FILES: tuple[bytes, ...] = (
    b"\xff\xfe\x00a",
    "a red circle\n".encode("utf-16"),
    b"\xef\xbb\xbfa red circle\n",
    b"\x1b]0;owned\x07\x1b[2J\n" * 3,
    b"a\x00b\n",
    "a\u2028b\u0085c\x0bd\n".encode(),
    b"a" * 3_000_000,
    b"a\n" * 1_990_000,
    b"# only a comment\n",
    b"",
    b"(" * 10_000 + b"a" + b")" * 10_000,
    b"\xf0\x9f\x98\x80" * 5000,
    b"a\r\n\r\nb\rc",
)


def model(draw: Draw) -> Plan:
    """A model folder, any file of it."""
    command: Sequence[str] = GENERATE if draw.healthy else draw.rng.choice(_ON_MODEL)
    slow = draw.chance(0.25)
    folder = draw.copy(draw.templates.shapes if slow else draw.templates.tiny, "model")
    if slow and command is GENERATE and draw.chance(0.85):  # it compiles for seconds
        command = ("info", "model")
    if draw.chance(0.5):  # so that what is behind the checks of the manifest is reached
        (folder / "sdvino.json").unlink()
    draw.damage(folder)
    return Plan(command, silent=_must_notice(draw, folder, command))


def _must_notice(draw: Draw, folder: Path, command: Sequence[str]) -> bool:
    """Tell whether the manifest's SHA-256s say that what the command reads is not what it was."""
    if "cwd/model/sdvino.json" in {change.file for change in draw.room.changes}:
        return False
    if not (folder / "sdvino.json").is_file():
        return False
    changed = [change.file for change in draw.room.changes if change.content]
    names = {tuple(file.split("/")[2:]) for file in changed}
    if "--verify" in command:
        return any(parts[0] in (*_RUN_PARTS, "vae_encoder", "tiny_vae") for parts in names)
    weights = {parts[0] for parts in names if parts[-1] == "openvino_model.bin"}
    return command[0] == "generate" and not weights.isdisjoint(_RUN_PARTS)


def graph(draw: Draw) -> Plan:
    """OpenVINO's XML, and a Broadcast that folds to an enormous size."""
    rng = draw.rng
    folder = draw.copy(draw.templates.bomb, "model")
    if draw.chance(0.1):
        weights = folder / "vae_decoder" / "openvino_model.bin"
        at = bomb_offset(weights.with_suffix(".xml").read_text(encoding="utf-8"))
        shape = [1, 3, rng.choice(_HUGE), rng.choice(_HUGE)]
        numbers = b"".join(side.to_bytes(8, "little", signed=True) for side in shape)
        content = weights.read_bytes()
        weights.write_bytes(content[:at] + numbers + content[at + 32 :])
        draw.note("vae_decoder", f"Broadcast to {shape}")
        return Plan(GENERATE)
    xml = folder / rng.choice(_RUN_PARTS) / "openvino_model.xml"
    for _ in range(draw.times()):
        content, what = mutate_xml(rng, xml.read_bytes())
        xml.write_bytes(content)
        draw.note(xml.parent.name, what)
    return Plan(("info", "model") if draw.chance(0.1) else GENERATE)


def source(draw: Draw) -> Plan:
    """A diffusers folder to convert, now and then for real."""
    folder = draw.copy(draw.templates.source, "source")
    if draw.chance(0.3):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        table = {name: file.name for name, *_ in read_safetensors(file)}
        index = {"metadata": {"total_size": 1}, "weight_map": table}
        draw.write(f"source/unet/{file.name}.index.json", json.dumps(index).encode())
    if draw.chance(0.1):
        for extra in ("unet/diffusion_pytorch_model.bin", "evil.py", "unet/modeling.py"):
            draw.write(f"source/{extra}", PICKLE)
    draw.damage(folder)
    if draw.chance(_REAL_SHARE):
        return Plan(draw.rng.choice((REAL, FIRST_USE)))
    return Plan(DRY_RUN)


def checkpoint(draw: Draw) -> Plan:
    """A single file in the original naming, its hints, and a vocabulary."""
    file = draw.copy(draw.templates.checkpoint, "model.safetensors")
    tokenizer = draw.copy(draw.templates.source / "tokenizer", "tokenizer")
    hints = draw.write("model.yaml", b"model:\n  params:\n    parameterization: v\n")
    if draw.chance(0.1):
        hints.write_bytes(b"\n" * 10**6 if draw.chance(0.5) else b"parameterization: " * 10**5)
    files = (file, file, file, hints, tokenizer) if draw.chance(0.5) else (file,)
    draw.damage(*files)
    command = ["convert", "model.safetensors", "out", "--dry-run", "--tokenizer", "tokenizer"]
    if draw.chance(0.2):
        command += ["--prediction-type", draw.rng.choice(("epsilon", *TEXTS[:3]))]
    return Plan(command)


def lora(draw: Draw) -> Plan:
    """A LoRA in one of three namings, and its weight."""
    draw.copy(draw.templates.source, "source")
    name, down, up, alpha = _LORAS[0] if draw.healthy else draw.rng.choice(_LORAS)
    tensors = {down: ("F16", [4, 64], bytes(512)), up: ("F16", [64, 4], bytes(512))}
    if alpha is not None:
        tensors[alpha] = ("F16", [], b"\x00\x44")
    config = '{"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}}'
    file = draw.room.cwd / name
    write_safetensors(file, tensors, {"lora_adapter_metadata": config, "modelspec.title": "x"})
    beside = draw.write("adapter_config.json", b'{"r": 4, "lora_alpha": 4, "peft_type": "LORA"}')
    draw.damage(file, file, beside)
    weight = draw.rng.choice(_WEIGHTS) if draw.chance(0.2) else ":0.5"
    return Plan((*DRY_RUN, "--lora", f"{file.name}{weight}"))


def vae(draw: Draw) -> Plan:
    """Another autoencoder, full or tiny, as a folder or a file."""
    draw.copy(draw.templates.source, "source")
    part = "vae" if draw.healthy else draw.rng.choice(("vae", "tiny_vae"))
    folder = draw.copy(draw.templates.source / part, "other")
    draw.damage(folder)
    what = "other/diffusion_pytorch_model.safetensors" if draw.chance(0.5) else "other"
    return Plan((*DRY_RUN, f"--{part.replace('_', '-')}", what))


def recipe(draw: Draw) -> Plan:
    """A recipe as a file."""
    from sdvino.compress.recipe_file import to_toml
    from sdvino.compress.recipes import get_recipe

    draw.copy(draw.templates.source, "source")
    text = to_toml(get_recipe(draw.rng.choice(_RECIPES)))
    if draw.chance(0.5):
        text = text.partition("\n[calibration]")[0] + _PASSES
    file = draw.write("recipe.toml", text.encode())
    draw.damage(file)
    return Plan((*DRY_RUN, "--recipe", "recipe.toml"))


def prompts(draw: Draw) -> Plan:
    """A list of prompts, to draw or to calibrate on."""
    draw.copy(draw.templates.tiny, "model")
    draw.copy(draw.templates.source, "source")
    file = draw.write("prompts.txt", b"a red circle\na blue ring\n")
    name = file.name
    if draw.chance(0.15):
        name = draw.rng.choice(("/dev/zero", "/proc/self/mem", "model", "nothing.txt", "fifo"))
        make_fifo(draw.room.cwd / "fifo")
    elif draw.chance(0.6):
        file.write_bytes(draw.rng.choice(_PROMPT_FILES))
        draw.note(name, "other content")
    else:
        draw.damage(file)
    many = ["-n", draw.rng.choice(("3", "10000"))] if draw.chance(0.2) else []
    drawing = ["generate", "--prompts", name, "-m", "model", *DRAW, "-o", "picture.png", *many]
    commands = (drawing, [*DRY_RUN, "--prompts", name])
    return Plan(
        commands[0] if draw.healthy else draw.rng.choice(commands), enough=15.0, quoted=True
    )
