"""A tiny Stable Diffusion with random weights, in torch and as optimum-intel exports it."""

from __future__ import annotations

import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.text.folders import vocabulary, write_legacy

LAYERS = 3
SCALING = 0.18215


class Compiled:
    """A component for tests: the real graph on the CPU in float32, by the graph's protocol."""

    def __init__(self, model: ov.Model) -> None:
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._request = compiled.create_infer_request()
        self.calls = 0

    def infer(self, inputs: Any) -> dict[str, NDArray[Any]]:
        self.calls += 1
        result = self._request.infer(dict(inputs), share_outputs=True)
        return {name: value for port, value in result.items() for name in port.get_names()}


def some_latents(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def read(component: str) -> ov.Model:
    """Return a fresh copy of an exported component."""
    return ov.Core().read_model(str(xml(component)))


def xml(component: str) -> Path:
    """Return the exported graph's file; read only."""
    return Path(_export().name) / component / "openvino_model.xml"


@lru_cache(maxsize=1)
def torch_pipeline() -> Any:
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = CLIPTokenizer.from_pretrained(write_legacy(Path(folder)))
    ids = len(vocabulary()[0])
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=ids,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            projection_dim=16,
            bos_token_id=ids - 2,
            eos_token_id=ids - 1,
            pad_token_id=ids - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=SCALING,
        mid_block_add_attention=False,
    )
    for module in (text_encoder, unet, vae):
        _shake(module)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@lru_cache(maxsize=1)
def torch_tiny() -> Any:
    """A tiny decoder with random weights: convolutions alone, no norms."""
    torch.manual_seed(2)
    tiny = AutoencoderTiny(
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_block_out_channels=(8, 8, 8, 8),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    return tiny.eval()


def tiny_decoder() -> ov.Model:
    """Return it as a converted folder has it: ``latent_sample`` to ``sample`` (-1 to 1)."""

    class Decode(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tiny = torch_tiny()

        def forward(self, latent_sample: torch.Tensor) -> Any:
            return self.tiny.decode(latent_sample).sample

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns
        model = ov.convert_model(Decode().eval(), example_input=torch.zeros(1, 4, 4, 4))
    model.inputs[0].get_tensor().set_names({"latent_sample"})
    model.outputs[0].get_tensor().set_names({"sample"})
    return model


@lru_cache(maxsize=1)
def _export() -> tempfile.TemporaryDirectory[str]:
    from optimum.exporters.openvino import export_from_model

    # On Windows a mapped .bin cannot be removed while a model holds it.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing and the exporter's own imports warn a lot
        export_from_model(
            torch_pipeline(), output=folder.name, task="text-to-image", stateful=False
        )
    return folder


def _shake(module: torch.nn.Module) -> None:
    """Give norms and biases values of their own, so that leaving one out shows."""
    module.eval()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.2 * torch.randn_like(value))
