"""The float pipeline of an exported folder, as calibration runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.diffusion.grids import train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.text.tokenizer import ClipTokenizer

Array = NDArray[np.float32]


# diffusers' default of AutoencoderKL, for configs from before the field existed.
_SCALING_FACTOR = 0.18215


class FloatPipeline:
    """Text encoder, UNet and VAE decoder of the folder ``path``, compiled on the CPU in f32."""

    def __init__(self, path: Path, core: ov.Core) -> None:
        scheduler = SchedulerConfig.from_dict(_read(path / "scheduler" / "scheduler_config.json"))
        process = scheduler.for_sampler("ddim")
        self.prediction_type: str = process.prediction_type
        self.alphas_cumprod = train_alphas_cumprod(process, keep_zero=True)
        vae = _read(path / "vae_decoder" / "config.json")
        self._scaling_factor = float(vae.get("scaling_factor", _SCALING_FACTOR))
        length = int(_read(path / "text_encoder" / "config.json")["max_position_embeddings"])
        self._tokenizer = ClipTokenizer.from_folder(path / "tokenizer", length)
        self._models = {
            name: core.compile_model(
                path / name / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
            for name in ("text_encoder", "unet", "vae_decoder")
        }

    def encode(self, prompt: str) -> dict[str, Array]:
        """Return what the UNet is told of ``prompt``: the text encoder's hidden states."""
        ids = self._tokenizer.encode(prompt).ids
        return {"encoder_hidden_states": self._run("text_encoder", {"input_ids": ids})}

    def predict(self, sample: Array, timestep: int, conditions: Mapping[str, Array]) -> Array:
        """Return the UNet's output for latents [1, C, h, w] at an integer timestep."""
        return self._run(
            "unet",
            {
                "sample": sample,
                "timestep": np.array([timestep], dtype=np.int64),
                **conditions,
            },
        )

    def decode(self, latents: Array) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1]."""
        fed = latents / np.float32(self._scaling_factor)
        return fed, self._run("vae_decoder", {"latent_sample": fed})

    def _run(self, name: str, inputs: dict[str, NDArray[Any]]) -> Array:
        return np.array(self._models[name](inputs)[0], dtype=np.float32)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
