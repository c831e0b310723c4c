"""The demo model in the runtimes that share its layout, and theirs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdvino import StableDiffusionPipeline
from sdvino.convert.api import convert
from sdvino.diffusion.noise import make_noise
from sdvino.model_folder import ModelFolder
from tests.conftest import SHAPES_SOURCE

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]
PROMPT = "a big red circle on a blue background"
STEPS, GUIDANCE, SEED = 4, 3.0, 11
# Dynamic and static kernels round 8-bit products otherwise, and guidance carries that further with
# every step: few steps tell another picture from another rounding.
SAME_PICTURE = 30.0
Picture = NDArray[np.float64]


@pytest.fixture(scope="module")
def shapes_source() -> Path:
    """The weights that the bundled demo model was made from. Read only."""
    return SHAPES_SOURCE


def psnr(one: Picture, other: Picture) -> float:
    error = float(np.mean((one - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def draw(folder: Path) -> Picture:
    """The picture here, by the scheduler that the other runtimes read from the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    out = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=SEED,
        scheduler="ddim",
    )
    return np.asarray(out.images[0], dtype=np.float64)


def in_genai(folder: Path) -> Picture:
    import openvino as ov
    import openvino_genai

    class Noise(openvino_genai.Generator):  # type: ignore[misc]
        """torch's noise, as here: GenAI's own generator is another."""

        def __init__(self) -> None:
            super().__init__()
            self.noise = make_noise("torch", SEED)

        def randn_tensor(self, shape: Any) -> Any:
            return ov.Tensor(self.noise.randn(list(shape)))

    pipeline = openvino_genai.Text2ImagePipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    result = pipeline.generate(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=Noise()
    )
    return np.array(result.data[0], dtype=np.float64)


def in_optimum(folder: Path) -> Picture:
    import torch
    from optimum.intel import OVStableDiffusionPipeline

    pipeline = OVStableDiffusionPipeline.from_pretrained(
        folder, device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    out = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    )
    return np.asarray(out.images[0], dtype=np.float64)


def test_openvino_genai_draws_the_same_picture(shapes: Path) -> None:
    assert psnr(in_genai(shapes), draw(shapes)) >= SAME_PICTURE


def test_optimum_intel_draws_the_same_picture(shapes: Path) -> None:
    assert psnr(in_optimum(shapes), draw(shapes)) >= SAME_PICTURE


def test_a_folder_that_optimum_intel_exported_draws_the_same_picture_here(
    shapes_source: Path, tmp_path: Path
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline as TorchPipeline
    from optimum.exporters.openvino import export_from_model

    pipeline = TorchPipeline.from_pretrained(shapes_source, torch_dtype=torch.float32)
    out = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    )
    folder = tmp_path / "exported"
    export_from_model(pipeline, output=folder, task="text-to-image", stateful=False)
    assert not (folder / "sdvino.json").exists()
    assert psnr(np.asarray(out.images[0], dtype=np.float64), draw(folder)) >= 40


def test_converting_the_demo_model_again_gives_the_same_picture(
    shapes: Path, shapes_source: Path, tmp_path: Path
) -> None:
    bundled = ModelFolder.open(shapes).manifest
    assert bundled is not None
    again = convert(shapes_source, tmp_path / "again", recipe=bundled.recipe, target="avx2")
    assert again.manifest is not None
    assert again.manifest.suggested == bundled.suggested
    precisions = {name: part.precision for name, part in bundled.components.items()}
    assert {n: part.precision for n, part in again.manifest.components.items()} == precisions
    # Bit for bit on the machine that made it; another CPU's kernels round otherwise.
    assert psnr(draw(again.path), draw(shapes)) >= 40
