"""Our folders in the runtimes that share their layout, and theirs here.

The demo model, whose weights are trained, draws the same picture everywhere. Every family by every
recipe, with random weights in miniature, is loaded and run by both.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline
from sdvino.compress.recipes import RECIPES
from sdvino.convert.api import convert
from sdvino.diffusion.noise import make_noise
from sdvino.folder.index import ModelFolder
from tests.conftest import SHAPES_SOURCE
from tests.convert.miniatures import Miniatures

pytestmark = [
    pytest.mark.slow,
    # torch's tracer and the libraries around it warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]
# Dynamic and static kernels round 8-bit products otherwise, and guidance carries that further with
# every step: few steps tell another picture from another rounding.
SAME_PICTURE = 30.0
Picture = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """A picture to draw."""

    prompt: str = "a big red circle on a blue background"
    negative: str | None = None
    steps: int = 4
    guidance: float = 3.0
    seed: int = 11
    #: None: the folder's own.
    scheduler: Any = None
    #: height and width; none: the model's own.
    size: dict[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What diffusers' calls and GenAI's generate take under the same names."""
        told = {"negative_prompt": self.negative} if self.negative is not None else {}
        common = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return {**common, **told, **self.size}


DEMO = Order(scheduler="ddim")


@pytest.fixture(scope="module")
def shapes_source() -> Path:
    """The weights that the bundled demo model was made from. Read only."""
    return SHAPES_SOURCE


def psnr(one: Picture, other: Picture) -> float:
    error = float(np.mean((one - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def draw(folder: Path, order: Order = DEMO) -> Picture:
    """The picture here, by the scheduler that the other runtimes read from the folder."""
    f32 = RunSettings(default=DeviceSettings(precision="f32"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, settings=f32)
    out = pipeline(order.prompt, seed=order.seed, scheduler=order.scheduler, **order.options)
    return np.asarray(out.images[0], dtype=np.float64)


def in_genai(folder: Path, order: Order = DEMO) -> Picture:
    import openvino as ov
    import openvino_genai

    class Noise(openvino_genai.Generator):  # type: ignore[misc]
        """torch's noise, as here: GenAI's own generator is another."""

        def __init__(self) -> None:
            super().__init__()
            self.noise = make_noise("torch", order.seed)

        def randn_tensor(self, shape: Any) -> Any:
            return ov.Tensor(self.noise.randn(list(shape)))

    pipeline = openvino_genai.Text2ImagePipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    result = pipeline.generate(order.prompt, generator=Noise(), **order.options)
    return np.array(result.data[0], dtype=np.float64)


#: The class in model_index.json -> optimum-intel's.
IN_OPTIMUM = {
    "StableDiffusionPipeline": "OVStableDiffusionPipeline",
    "StableDiffusionXLPipeline": "OVStableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline": "OVLatentConsistencyModelPipeline",
}


def in_optimum(folder: Path, order: Order = DEMO) -> Picture:
    import optimum.intel
    import torch

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(optimum.intel, IN_OPTIMUM[index["_class_name"]])
    pipeline = cls.from_pretrained(
        folder, device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(order.seed)
    options = dict(order.options)
    if "LatentConsistency" in cls.__name__:
        options.pop("negative_prompt", None)  # which it does not know
    out = pipeline(order.prompt, generator=generator, **options)
    return np.asarray(out.images[0], dtype=np.float64)


@dataclass(frozen=True)
class Family:
    """A family in the other runtimes."""

    arch: str
    order: Order
    #: Whether GenAI's sampler takes its noise as ours does.
    same_in_genai: bool = True


# Not smaller: OpenVINO fails to compile 8-bit weights of a convolution over one latent.
SIDE = 128
SIZE = {"height": SIDE, "width": SIDE}
GUIDED = Order(negative="blurry", steps=2, size=SIZE)
SD1, SDXL = Family("tiny-sd15", GUIDED), Family("tiny-sdxl", GUIDED)
SD2 = Family("tiny-sd2-v", GUIDED)
LCM = Family("tiny-lcm", Order(steps=2, guidance=8.5, size=SIZE), same_in_genai=False)
FAMILIES = (
    SD1,
    SD2,
    LCM,
    SDXL,
    Family("tiny-sd2", GUIDED),
    Family("tiny-small-sd", GUIDED),
    Family("tiny-sd-turbo", GUIDED),
    Family("tiny-sdxl-turbo", GUIDED),
    Family("tiny-ssd1b", GUIDED),
)
#: Each way to store weights; then what other families are told. All of them take some 15 minutes:
#: SDVINO_EVERY_PAIR=1 runs them.
PAIRS = (
    [(family, recipe) for family in FAMILIES for recipe in RECIPES]
    if os.environ.get("SDVINO_EVERY_PAIR")
    else [
        *((SD1, name) for name in ("fp16", "int8-weights", "int8-hybrid", "int8", "int4-weights")),
        (SDXL, "int8"),
        (SD2, "int8-weights"),
        (LCM, "int8"),
    ]
)
#: dB. Random weights give rounding more room than trained ones. OpenVINO may round activations
#: to 8 bits where weights are, and dynamic and static kernels round quantized ones otherwise.
LEAST = {
    "fp16": 40.0,
    "int8-weights": 30.0,
    "int4-weights": 30.0,
    "int8-hybrid": 18.0,
    "int8": 18.0,
    "global": 10.0,
    "local": 18.0,
}


@pytest.mark.parametrize(
    ("family", "recipe"), PAIRS, ids=[f"{family.arch}-{recipe}" for family, recipe in PAIRS]
)
def test_every_family_and_every_recipe_runs_in_both(
    family: Family, recipe: str, miniatures: Miniatures
) -> None:
    folder = miniatures.folder(family.arch, recipe)
    ours = draw(folder, family.order)
    for run, same in ((in_genai, family.same_in_genai), (in_optimum, True)):
        theirs = run(folder, family.order)
        assert theirs.shape == ours.shape == (SIDE, SIDE, 3)
        assert float(np.std(theirs)) > 1.0, run.__name__
        if same:
            assert psnr(theirs, ours) >= LEAST[recipe], run.__name__


def test_openvino_genai_draws_the_same_picture(shapes: Path) -> None:
    assert psnr(in_genai(shapes), draw(shapes)) >= SAME_PICTURE


def test_optimum_intel_draws_the_same_picture(shapes: Path) -> None:
    assert psnr(in_optimum(shapes), draw(shapes)) >= SAME_PICTURE


@pytest.fixture(scope="module")
def exported(shapes_source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Picture]:
    """The demo model's weights as optimum-cli exports them, and the picture that torch draws."""
    import torch
    from diffusers import StableDiffusionPipeline as TorchPipeline
    from optimum.exporters.openvino import export_from_model

    pipeline = TorchPipeline.from_pretrained(shapes_source, torch_dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(DEMO.seed)
    out = pipeline(DEMO.prompt, generator=generator, **DEMO.options)
    folder = tmp_path_factory.mktemp("optimum") / "exported"
    export_from_model(pipeline, output=folder, task="text-to-image", stateful=False)
    assert not (folder / "sdvino.json").exists()
    return folder, np.asarray(out.images[0], dtype=np.float64)


@pytest.mark.parametrize(
    "kept", [None, ("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=["all", "old", "new"]
)
def test_a_folder_that_optimum_intel_exported_draws_the_same_picture_here(
    exported: tuple[Path, Picture],
    shapes_source: Path,
    tmp_path: Path,
    kept: tuple[str, ...] | None,
) -> None:
    """As it is, and with nothing but the tokenizer's files of the old layout, or of the new."""
    folder, expected = exported
    if kept is not None:
        folder = shutil.copytree(folder, tmp_path / "model")
        shutil.rmtree(folder / "tokenizer")
        (folder / "tokenizer").mkdir()
        for name in kept:
            file = exported[0] / "tokenizer" / name
            file = file if file.is_file() else shapes_source / "tokenizer" / name
            shutil.copyfile(file, folder / "tokenizer" / name)
    assert psnr(expected, draw(folder)) >= 40


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
