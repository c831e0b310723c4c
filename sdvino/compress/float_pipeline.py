"""The float pipeline of an exported folder, as calibration runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

Array = NDArray[np.float32]


class FloatPipeline:
    """Text encoder, UNet and VAE decoder of the folder ``path``, compiled on the CPU in f32."""

    def __init__(self, path: Path, core: ov.Core) -> None:
        from transformers import CLIPTokenizer

        def read(name: str) -> dict[str, Any]:
            data: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
            return data

        scheduler = read("scheduler/scheduler_config.json")
        vae = read("vae_decoder/config.json")
        self.prediction_type = scheduler.get("prediction_type", "epsilon")
        betas = (
            np.linspace(
                scheduler["beta_start"] ** 0.5,
                scheduler["beta_end"] ** 0.5,
                scheduler["num_train_timesteps"],
            )
            ** 2
        )
        self.alphas_cumprod = np.cumprod(1 - betas)
        self._scaling_factor = float(vae.get("scaling_factor", 0.18215))
        self._tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        self._models = {
            name: _compile(core, path / name / "openvino_model.xml")
            for name in ("text_encoder", "unet", "vae_decoder")
        }

    def encode(self, prompt: str) -> Array:
        """Return the text encoder's hidden states, [1, 77, D]."""
        ids = self._tokenizer(
            prompt, padding="max_length", max_length=77, truncation=True, return_tensors="np"
        )["input_ids"]
        return self._run("text_encoder", {"input_ids": ids.astype(np.int64)})

    def predict(self, sample: Array, timestep: int, hidden_states: Array) -> Array:
        """Return the UNet's output for latents [1, C, h, w] at an integer timestep."""
        return self._run(
            "unet",
            {
                "sample": sample,
                "timestep": np.array([timestep], dtype=np.int64),
                "encoder_hidden_states": hidden_states,
            },
        )

    def decode(self, latents: Array) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1]."""
        fed = latents / np.float32(self._scaling_factor)
        return fed, self._run("vae_decoder", {"latent_sample": fed})

    def _run(self, name: str, inputs: dict[str, NDArray[Any]]) -> Array:
        result = self._models[name](inputs)
        return np.array(result[0], dtype=np.float32)


def _compile(core: ov.Core, xml: Path) -> ov.CompiledModel:
    return core.compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
