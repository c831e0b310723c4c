"""Every family, exported by optimum-intel, against diffusers with the same weights (torch, f32)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray

from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline
from sdvino.text.conditions import embed_guidance_scale

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]
SEED = 11
MIN_PSNR = 40.0
MAX_ERROR = 1e-3
PROMPT = "a red lighthouse at dusk, wow! painted"
F32 = RunSettings(default=DeviceSettings(precision="f32"))
Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """One family: an architecture of make_synthetic.py, exported, and its scheduler."""

    name: str
    #: The architecture whose weights it has; another's scheduler may stand beside them.
    weights: str
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = [
    Family("tiny-small-sd", "tiny-small-sd", {"guidance_scale": 7.5}),
    Family("tiny-sd2", "tiny-sd2", {"guidance_scale": 7.5, "negative_prompt": "a cat"}),
    Family("tiny-sd2-v", "tiny-sd2", {"guidance_scale": 7.5}),
    Family("tiny-sd-turbo", "tiny-sd2", {"guidance_scale": 0.0, "num_inference_steps": 2}),
    Family("tiny-lcm", "tiny-lcm", {"guidance_scale": 8.5}),
    Family("tiny-sdxl", "tiny-sdxl", {"guidance_scale": 5.0}),
    Family("tiny-sdxl-turbo", "tiny-sdxl", {"guidance_scale": 0.0, "num_inference_steps": 2}),
    Family("tiny-ssd1b", "tiny-ssd1b", {"guidance_scale": 5.0, "negative_prompt": "a cat"}),
]
BY_NAME = {family.name: family for family in FAMILIES}


class Both:
    """One family in both libraries."""

    def __init__(self, theirs: Any, folder: Path) -> None:
        self.theirs = theirs
        self.folder = folder
        self.ours = StableDiffusionPipeline.from_pretrained(folder, settings=F32)

    def compare(self, **options: Any) -> tuple[float, float]:
        """Return the latents' relative error and the PSNR of the pictures (0 to 1) in dB."""
        import torch

        given = {"prompt": PROMPT, "num_inference_steps": 4, **options}
        results = []
        for output_type in ("latent", "np"):
            generator = torch.Generator("cpu").manual_seed(SEED)
            theirs = self.theirs(**given, output_type=output_type, generator=generator).images
            ours = self.ours(**given, output_type=output_type, seed=SEED).images
            results.append((ours, np.asarray(theirs)))
        (latents, expected), (picture, wanted) = results
        error = float(np.linalg.norm(latents - expected) / np.linalg.norm(expected))
        difference = float(np.mean((picture.astype(np.float64) - wanted) ** 2))
        return error, 99.0 if difference == 0 else 10 * float(np.log10(1 / difference))

    def agree(self, **options: Any) -> None:
        error, psnr = self.compare(**options)
        assert psnr >= MIN_PSNR, f"{psnr:.1f} dB, latents {error:.1e}"
        assert error <= MAX_ERROR, f"{psnr:.1f} dB, latents {error:.1e}"


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """Return a function that gives a family in both libraries; each is exported once a session."""
    base = tmp_path_factory.mktemp("families")

    @lru_cache
    def export(weights: str) -> Path:
        import make_synthetic
        import torch
        from diffusers import DiffusionPipeline
        from optimum.exporters.openvino import export_from_model

        source = base / f"{weights}-source"
        make_synthetic.make(weights, source)
        pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
        folder = base / f"{weights}-exported"
        export_from_model(pipeline, output=folder, task="text-to-image", stateful=False)
        return folder

    @lru_cache
    def give(name: str) -> Both:
        import torch
        from diffusers import DiffusionPipeline
        from synthetic_architectures import ARCHITECTURES

        family = BY_NAME[name]
        exported = export(family.weights)
        folder = base / name
        shutil.copytree(exported, folder)
        source = base / f"{name}-torch"
        shutil.copytree(base / f"{family.weights}-source", source)
        scheduler = ARCHITECTURES[name]["scheduler"]
        for path in (folder, source):
            index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
            (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
            (path / "scheduler" / "scheduler_config.json").write_text(
                json.dumps(scheduler), encoding="utf-8"
            )
        theirs: Any = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        return Both(theirs, folder)

    return give


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_picture_is_that_of_diffusers(family: Family, both: Callable[[str], Both]) -> None:
    both(family.name).agree(**family.options)


def test_lcm_asks_once(both: Callable[[str], Both]) -> None:
    lcm = both("tiny-lcm").ours
    assert lcm.folder.guidance_width == 16
    out = lcm(PROMPT, seed=0, output_type="latent")
    assert out.timings.unet_evaluations == 4
    assert out.records[0].request.guidance_scale == 8.5
    other = lcm(PROMPT, seed=0, output_type="latent", guidance_scale=2.0)
    assert not np.array_equal(out.images, other.images)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": ""},
        {"negative_prompt": "blurry!", "height": 64, "width": 192},
        {"clip_skip": 1, "negative_prompt": "blurry"},
        {"prompt": ""},
        {"guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_sdxl_in_all_its_ways(options: dict[str, Any], both: Callable[[str], Both]) -> None:
    both("tiny-sdxl").agree(guidance_scale=5.0, num_inference_steps=2, **options)


def test_clip_skip_of_one_text_encoder(both: Callable[[str], Both]) -> None:
    both("tiny-sd2").agree(guidance_scale=5.0, clip_skip=1, negative_prompt="blurry")


def test_sdxl_embeddings_of_diffusers(both: Callable[[str], Both]) -> None:
    sdxl = both("tiny-sdxl")
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    encoded = sdxl.theirs.encode_prompt(PROMPT, None, "cpu", 1, True, "blurry")
    embeds = {name: value.detach().numpy() for name, value in zip(names, encoded, strict=True)}
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    embedded = sdxl.ours(**embeds, **options).images
    direct = sdxl.ours(PROMPT, negative_prompt="blurry", **options).images
    np.testing.assert_allclose(embedded, direct, atol=1e-3)


def test_text_encoders_that_give_their_last_state_alone(
    both: Callable[[str], Both], tmp_path: Path
) -> None:
    """The layer before the last is found in the graph where it is no output of it."""
    sdxl = both("tiny-sdxl")
    folder = shutil.copytree(sdxl.folder, tmp_path / "model")
    for name in ("text_encoder", "text_encoder_2"):
        xml = folder / name / "openvino_model.xml"
        model = ov.Core().read_model(str(sdxl.folder / name / "openvino_model.xml"))
        for port in model.outputs:
            if any(found.startswith("hidden_states.") for found in port.get_names()):
                model.remove_result(port.get_node())
        ov.save_model(model, xml, compress_to_fp16=False)
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    ours = StableDiffusionPipeline.from_pretrained(folder, settings=F32)
    np.testing.assert_allclose(
        ours(PROMPT, **options).images, sdxl.ours(PROMPT, **options).images, atol=1e-3
    )


@pytest.mark.parametrize("width", [4, 16, 17, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 8.5])
def test_the_guidance_scale_is_embedded_as_in_diffusers(scale: float, width: int) -> None:
    import torch
    from diffusers import LatentConsistencyModelPipeline

    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([scale - 1]), embedding_dim=width).numpy()
    # Angles of some thousand radians: half a unit in the last place of float32 is 2e-4.
    np.testing.assert_allclose(embed_guidance_scale(scale, width), expected, atol=1e-3)
