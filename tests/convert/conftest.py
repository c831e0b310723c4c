"""A source folder in miniature: real files, real checks, weights that nothing here traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_synthetic
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.miniatures import Miniatures

CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "_name_or_path": "/home/someone/checkpoints/model",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "unet/config.json": {"in_channels": 4, "sample_size": 16, "cross_attention_dim": 32},
    "vae/config.json": {"latent_channels": 4, "scaling_factor": 0.18215},
    "text_encoder/config.json": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 530,
        "max_position_embeddings": 77,
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "steps_offset": 1},
    "tokenizer/vocab.json": {},
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A diffusers folder that passes every check made before the libraries are imported."""
    folder = tmp_path / "a-model"
    for name, value in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for name, stem in WEIGHTS.items():
        save_file({"weight": np.ones(4, np.float16)}, folder / name / f"{stem}.safetensors")
    return folder


@pytest.fixture
def edit(source: Path) -> Callable[[str, Any], None]:
    """Return a function that changes keys of one JSON file of the source."""

    def change(file: str, changes: Any) -> None:
        path = source / file
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")

    return change


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Miniatures:
    """Every family in miniature by every recipe, each made when it is asked for. Read only."""
    return Miniatures(tmp_path_factory.mktemp("miniatures"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with as many tokens as CLIP's."""
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    make_synthetic.write_tokenizer(folder, make_synthetic.EOS)
    return folder
