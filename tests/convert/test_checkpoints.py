"""Whole checkpoints in the original naming, held against diffusers loading the same file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_synthetic
import numpy as np
import pytest
import synthetic_architectures
from original_naming import (
    clip_to_ldm,
    clip_to_open_clip,
    original_state,
    unet_to_ldm,
    vae_to_ldm,
)

from sdvino import StableDiffusionPipeline
from sdvino.convert.api import convert
from sdvino.convert.single_file import SingleFile
from sdvino.text.clip_vocabulary import find_vocabulary
from sdvino.weights.numbers import as_float32
from tests.convert.checkpoint_architectures import CHECKPOINTS

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]
PROMPT = "a red circle on a blue background"
STEPS, GUIDANCE, SEED, SIDE = 3, 4.0, 11, 128
NAMES = {"sd2": "v2-1_512-base"}


@dataclass(frozen=True)
class Checkpoint:
    plan: dict[str, Any]
    #: The diffusers folder that it was made from.
    folder: Path
    file: Path


def load(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(next(folder.glob("*.safetensors"))))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    from safetensors.torch import save_file

    base = tmp_path_factory.mktemp("checkpoints")
    result = {}
    for arch, plan in CHECKPOINTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(synthetic_architectures.ARCHITECTURES, arch, plan)
            make_synthetic.make(arch, base / arch)
        state = original_state(base / arch, plan, load)
        file = base / f"{NAMES.get(arch, 'model-' + arch)}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
        result[arch] = Checkpoint(plan, base / arch, file)
    return result


def in_diffusers(checkpoint: Checkpoint, config: Path) -> Any:
    """Load the single file as diffusers does, with configs from the folder ``config``."""
    import diffusers
    import torch

    cls = getattr(diffusers, checkpoint.plan["pipeline"])
    return cls.from_single_file(
        str(checkpoint.file), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )


@pytest.mark.parametrize("arch", CHECKPOINTS)
def test_every_weight_lands_where_diffusers_puts_it(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, arch: str
) -> None:
    import torch

    checkpoint = checkpoints[arch]
    file = SingleFile.open(checkpoint.file)
    assert file.family.name == arch
    vocabulary = find_vocabulary(checkpoint.folder / "tokenizer", tokens=file.tokens)
    folder = file.outline(tmp_path, vocabulary)
    for component in file.components:
        expected, found = load(checkpoint.folder / component), file.components[component]
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == "F16"
            assert torch.equal(torch.from_numpy(found[name].read()), tensor), (component, name)
        # What shapes do not tell comes with sdvino; the native size of a miniature is its own.
        made = json.loads((checkpoint.folder / component / "config.json").read_text("utf-8"))
        for key, value in json.loads(
            (folder / component / "config.json").read_text("utf-8")
        ).items():
            if key not in ("sample_size", "dropout"):
                assert made.get(key) == value, (component, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_other_precisions_are_read(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = checkpoints["sd1"]
    kind = getattr(torch, dtype)
    state = {
        n: t.to(kind) if t.is_floating_point() else t for n, t in load_file(checkpoint.file).items()
    }
    save_file(state, tmp_path / "model.safetensors")
    found = SingleFile.open(tmp_path / "model.safetensors").components["unet"]
    for name, tensor in load(checkpoint.folder / "unet").items():
        assert torch.equal(torch.from_numpy(as_float32(found[name])), tensor.to(kind).float())


def shapes_of_real(arch: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give the names and shapes of a real-size checkpoint; no weight is made."""
    import diffusers
    import torch
    import transformers

    plan = synthetic_architectures.ARCHITECTURES[arch]
    states = {}
    with torch.device("meta"):
        for name, (library, cls, config) in plan["components"].items():
            if library == "diffusers":
                module = getattr(diffusers, cls).from_config(config)
            else:
                module = getattr(transformers, cls)(transformers.CLIPTextConfig(**config))
            states[name] = module.to(torch.float16).state_dict()
        unet = {**plan["components"]["unet"][2]}
        unet.setdefault("layers_per_block", 2)
        unet.setdefault("up_block_types", ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"])
        state = unet_to_ldm(states["unet"], unet)
        state |= vae_to_ldm(states["vae"], plan["components"]["vae"][2])
        if "text_encoder_2" in states:
            state |= clip_to_ldm(states["text_encoder"], "conditioner.embedders.0.transformer.")
            second = states["text_encoder_2"]
            state |= clip_to_open_clip(second, "conditioner.embedders.1.model.", extra_layer=False)
        elif arch.startswith("sd2"):
            text = states["text_encoder"]
            state |= clip_to_open_clip(text, "cond_stage_model.model.", extra_layer=True)
        else:
            state |= clip_to_ldm(states["text_encoder"], "cond_stage_model.transformer.")
    yield from ((name, tuple(tensor.shape)) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("arch", "family"), [("sd15", "sd1"), ("sd2-v", "sd2-v"), ("sdxl", "sdxl")]
)
def test_real_sizes_give_the_published_configs_without_a_weight_read(
    tmp_path: Path, arch: str, family: str
) -> None:
    import struct

    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes_of_real(arch):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole, not gigabytes
    found = SingleFile.open(path)
    assert found.family.name == family
    for name, (_, _, config) in synthetic_architectures.ARCHITECTURES[arch]["components"].items():
        for key, value in config.items():
            if (name, key) not in (("vae", "sample_size"), ("text_encoder", "projection_dim")):
                assert found.configs[name][key] == value, (name, key)


def psnr(one: Any, other: Any) -> float:
    error = float(np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("arch", ["sd1", "sd2-v", "sdxl"])
def test_the_converted_file_draws_what_diffusers_draws(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, arch: str
) -> None:
    import torch

    checkpoint = checkpoints[arch]
    tokenizer = checkpoint.folder / "tokenizer"
    folder = convert(checkpoint.file, tmp_path / "model", recipe="fp16", tokenizer=tokenizer)
    assert folder.manifest is not None
    assert folder.manifest.family == arch
    ours = StableDiffusionPipeline.from_pretrained(folder.path)(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=SEED,
        width=SIDE,
        height=SIDE,
        scheduler="ddim",
    )
    theirs = in_diffusers(checkpoint, checkpoint.folder)
    from diffusers import DDIMScheduler

    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    out = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        width=SIDE,
        height=SIDE,
    )
    assert psnr(ours.images[0], out.images[0]) >= 40
