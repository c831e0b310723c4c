"""LoRAs and autoencoders asked for at conversion: what is logged, recorded, refused and drawn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdvino.cli.main import main
from sdvino.convert.baking import BakingRequest, bake, baking_request
from sdvino.convert.source import DiffusersFolder
from sdvino.errors import RequestError
from sdvino.weights.autoencoder import kl_tensors
from tests.conftest import SHAPES_SOURCE
from tests.convert import autoencoder_files
from tests.weights import lora_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def linear_lora(width: int, layer: str = "down_blocks_0_attn2_to_k") -> dict[str, Any]:
    return {
        f"lora_unet_{layer}.lora_down.weight": torch.ones(2, width),
        f"lora_unet_{layer}.lora_up.weight": torch.ones(8, 2),
    }


@pytest.fixture
def opened(source: Path) -> DiffusersFolder:
    """A source whose UNet has one layer that a LoRA can change."""
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"down_blocks.0.attn2.to_k.weight": torch.zeros(8, 32)}, file)
    return DiffusersFolder.open(source)


def test_a_request_is_absolute_and_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = baking_request(
        ["a.safetensors:0.5", Path("b.safetensors"), ("c.safetensors", 2)], "vae", Path("tiny")
    )
    assert [Path(text).name for text in request.loras] == [
        "a.safetensors:0.5",
        "b.safetensors:1.0",
        "c.safetensors:2.0",
    ]
    assert all(path.is_absolute() for path in request.files)
    assert baking_request(request.loras, request.vae, request.tiny_vae) == request
    assert request.to_manifest() == {
        "loras": [
            {"name": "a", "weight": 0.5},
            {"name": "b", "weight": 1.0},
            {"name": "c", "weight": 2.0},
        ],
        "vae": "vae",
        "tiny_vae": "tiny",
    }
    assert str(tmp_path) not in json.dumps(request.to_manifest())
    assert BakingRequest().to_manifest() == {}
    with pytest.raises(RequestError, match="weight"):
        baking_request([("a.safetensors", float("nan"))])


def test_what_is_left_out_and_a_hint_are_logged(
    opened: DiffusersFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = linear_lora(32) | linear_lora(32, "no_such_layer")
    path = lora_files.save(tmp_path / "lcm.safetensors", tensors)
    with caplog.at_level(logging.WARNING, logger="sdvino"):
        baked = bake(opened, baking_request([path]))
    assert isinstance(baked, DiffusersFolder)
    assert [lora.name for lora in baked.loras] == ["lcm"]
    assert "2 tensors of the LoRA lcm fit nothing" in caplog.text
    assert "--suggest steps=4,guidance=1,scheduler=lcm" in caplog.text
    caplog.clear()
    assert bake(opened, baking_request([path]), say=False) == baked
    assert caplog.text == ""


def test_nothing_asked_for_is_nothing_done(opened: DiffusersFolder) -> None:
    assert bake(opened, BakingRequest()) == opened


def zero_vae(**changes: Any) -> dict[str, Any]:
    """The tensors of a small AutoencoderKL, without the time that importing diffusers takes."""
    rest = {
        "in_channels": 3,
        "out_channels": 3,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    config = {**autoencoder_files.KL, **rest, **changes}
    return {name: torch.zeros(shape) for name, shape in kl_tensors(config).items()}


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such LoRA": (lambda folder: ["--lora", str(folder / "no.safetensors")], "does not exist"),
    "a LoRA of another family": (
        lambda folder: [
            "--lora",
            str(lora_files.save(folder / "xl.safetensors", linear_lora(2048))) + ":0.5",
        ],
        "is for Stable Diffusion XL",
    ),
    "a LoRA that fits nothing": (
        lambda folder: [
            "--lora",
            str(lora_files.save(folder / "a.safetensors", linear_lora(32, "x"))),
        ],
        "Nothing in the LoRA",
    ),
    "a weight that is none": (
        lambda folder: [
            "--lora",
            str(lora_files.save(folder / "a.safetensors", linear_lora(32))) + ":much",
        ],
        "no weight of a LoRA",
    ),
    "no such VAE": (lambda folder: ["--vae", str(folder / "vae")], "does not exist"),
    "a VAE with other channels": (
        lambda folder: [
            "--vae",
            str(autoencoder_files.save(folder / "vae.safetensors", zero_vae(latent_channels=8))),
        ],
        "latents of 8 channels",
    ),
    "a LoRA for a tiny VAE": (
        lambda folder: [
            "--tiny-vae",
            str(lora_files.save(folder / "a.safetensors", linear_lora(32))),
        ],
        "AutoencoderTiny",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_end_with_a_sentence_and_leave_nothing(
    opened: DiffusersFolder, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    target = tmp_path / "target" / "model"
    status = main(["convert", str(opened.path), str(target), *arguments(tmp_path)])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not target.parent.exists()


WEIGHTS = {"style": 0.1, "detail": -0.05}


def fused(modules: dict[str, Any], factors: dict[str, Any]) -> None:
    """Merge by hand, in place."""
    for name, weight in WEIGHTS.items():
        for component, layers in factors[name].items():
            parameters = dict(modules[component].named_parameters())
            for layer, part in layers.items():
                value = parameters[f"{layer}.weight"]
                value.data = value.data + weight * part.delta().reshape(value.shape)


def disturbed(path: Path) -> dict[str, Any]:
    """The tensors of a file, a little changed, so that it is another autoencoder."""
    generator = torch.Generator().manual_seed(8)
    return {
        name: value.float() * (1 + 0.05 * torch.randn(value.shape, generator=generator))
        for name, value in load_file(path).items()
    }


def psnr(a: Any, b: Any) -> float:
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture
def theirs() -> Any:
    """diffusers' pipeline of the demo model's weights, in single precision."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(SHAPES_SOURCE, torch_dtype=torch.float32)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_picture_is_diffusers_own_with_the_same_weights(
    theirs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two LoRAs, another VAE in the original naming and a TAESD pair, through the command."""
    from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline

    prompt = "a big red star"
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0}

    def draw() -> Any:
        generator = torch.Generator("cpu").manual_seed(11)
        picture = theirs(prompt, generator=generator, **options, output_type="np").images[0]
        return (picture * 255).round()

    plain = draw()
    modules = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    factors = {
        "style": lora_files.random_factors(modules, 1, locon=True),
        "detail": lora_files.without_alphas(lora_files.random_factors(modules, 2)),
    }
    tensors = {
        "style": lora_files.kohya(factors["style"]),
        "detail": lora_files.peft(factors["detail"])[0],
    }
    arguments: list[str] = []
    for name, weight in WEIGHTS.items():
        path = lora_files.save(tmp_path / f"{name}.safetensors", tensors[name])
        arguments += ["--lora", f"{path}:{weight}"]
    weights = "diffusion_pytorch_model.safetensors"
    vae = disturbed(SHAPES_SOURCE / "vae" / weights)
    tiny = disturbed(SHAPES_SOURCE / "tiny_vae" / weights)
    autoencoder_files.save(
        tmp_path / "other.safetensors", autoencoder_files.to_original(vae, "first_stage_model.")
    )
    for side, half in zip(
        ("encoder", "decoder"), autoencoder_files.taesd_halves(tiny), strict=True
    ):
        autoencoder_files.save(tmp_path / "taesd" / f"taesd_{side}.safetensors", half)
    arguments += ["--vae", str(tmp_path / "other.safetensors")]
    arguments += ["--tiny-vae", str(tmp_path / "taesd")]
    target = tmp_path / "model"
    command = ["convert", str(SHAPES_SOURCE), str(target), "--recipe", "fp16", *arguments]
    assert main(command) == 0, capsys.readouterr().err

    told = json.loads((target / "sdvino.json").read_text(encoding="utf-8"))
    assert told["baked"] == {
        "loras": [{"name": name, "weight": weight} for name, weight in WEIGHTS.items()],
        "vae": "other",
        "tiny_vae": "taesd",
    }
    assert str(tmp_path) not in json.dumps(told)

    fused(modules, factors)
    theirs.vae.load_state_dict(vae)
    expected = draw()
    settings = RunSettings(default=DeviceSettings(precision="f32"))
    ours = StableDiffusionPipeline.from_pretrained(target, settings=settings)
    found = np.asarray(ours(prompt, seed=11, scheduler="euler", **options).images[0])
    assert psnr(found, expected) >= 40
    assert psnr(plain, expected) < 30  # all of it mattered

    import openvino as ov
    from diffusers import AutoencoderTiny

    module = AutoencoderTiny.from_pretrained(SHAPES_SOURCE / "tiny_vae").eval()
    module.load_state_dict(tiny)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        picture = module.decode(latents).sample.numpy()
    xml = target / "tiny_vae" / "openvino_model.xml"
    compiled = ov.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    decoded = compiled({"latent_sample": latents.numpy()})[0]
    assert np.linalg.norm(decoded - picture) <= 2e-3 * np.linalg.norm(picture)
