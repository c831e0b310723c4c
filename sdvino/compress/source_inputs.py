"""What a source's own pipeline feeds its components, recorded before anything is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.calibration import CalibrationPlan, collect
from sdvino.diffusion.grids import train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.text.tokenizer import ClipTokenizer

Array = NDArray[np.float32]
Inputs = dict[str, NDArray[Any]]

# Which weights matter shows on far fewer inputs than where activations end: a UNet of Stable
# Diffusion's size takes seconds for each in torch.
_LARGE_UNET_BYTES = 200_000_000
_LARGE = {"trajectories": 4, "strata": 4, "samples": 12}
_SMALL = {"trajectories": 16, "strata": 8, "samples": 64}
# diffusers' default of AutoencoderKL, for configs from before the field existed.
_SCALING_FACTOR = 0.18215


def plan_for_passes(plan: CalibrationPlan, unet_bytes: int) -> CalibrationPlan:
    """Return ``plan`` with as many inputs as passes need, and no more than it has."""
    most = _LARGE if unet_bytes >= _LARGE_UNET_BYTES else _SMALL
    count = min(most["trajectories"], len(plan.prompts))
    return replace(
        plan,
        prompts=tuple(plan.prompts[i * len(plan.prompts) // count] for i in range(count)),
        strata=min(most["strata"], plan.strata),
        unet_samples=min(most["samples"], plan.unet_samples),
    )


class TorchPipeline:
    """Text encoder, UNet and VAE of a source, as `sdvino.compress.calibration` runs them."""

    def __init__(
        self,
        modules: Mapping[str, Any],
        tokenizer: Path,
        scheduler: Mapping[str, Any],
        *,
        decodes: bool,
    ) -> None:
        """``modules``: text_encoder, unet and vae, in float32; the first is enough to encode.

        ``decodes``: pictures are wanted.
        """
        process = SchedulerConfig.from_dict(dict(scheduler)).for_sampler("ddim")
        self.prediction_type: str = process.prediction_type
        self.alphas_cumprod = train_alphas_cumprod(process, keep_zero=True)
        self._modules = modules
        self._decodes = decodes
        length = int(modules["text_encoder"].config.max_position_embeddings)
        self._tokenizer = ClipTokenizer.from_folder(tokenizer, length)
        vae = getattr(modules.get("vae"), "config", None)
        self._scaling = float(getattr(vae, "scaling_factor", _SCALING_FACTOR))
        #: Token ids of every prompt that was encoded.
        self.texts: list[Inputs] = []

    def encode(self, prompt: str) -> Inputs:
        """Return what the UNet is told of ``prompt``: the text encoder's hidden states."""
        from sdvino.compress.calls import call

        ids: Inputs = {"input_ids": self._tokenizer.encode(prompt).ids}
        self.texts.append(ids)
        return {"encoder_hidden_states": call(self._modules["text_encoder"], ids).numpy()}

    def predict(self, sample: Array, timestep: int, conditions: Mapping[str, Array]) -> Array:
        """Return the UNet's output for latents [1, C, h, w] at an integer timestep."""
        from sdvino.compress.calls import call

        inputs: Inputs = {
            "sample": sample,
            "timestep": np.array([timestep], np.int64),
            **conditions,
        }
        return np.asarray(call(self._modules["unet"], inputs).numpy())

    def decode(self, latents: Array) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1]."""
        from sdvino.compress.calls import call

        fed = latents / np.float32(self._scaling)
        if not self._decodes:
            return fed, np.zeros((1, 3, 1, 1), np.float32)
        return fed, np.asarray(call(self._modules["vae"], {"latent_sample": fed}).numpy())


def record(
    pipeline: TorchPipeline,
    plan: CalibrationPlan,
    components: Sequence[str],
    progress: Callable[[float], None],
) -> dict[str, list[Inputs]]:
    """Run ``pipeline`` as ``plan`` says; return what each of ``components`` was called with.

    Components are sub-folders of a source; a vae's calls decode and encode in turn.
    """
    if set(components) == {"text_encoder"}:
        for prompt in ("", *plan.prompts):
            pipeline.encode(prompt)
        return {"text_encoder": pipeline.texts}
    found = collect(pipeline, plan, progress)
    both = zip(found.vae_decoder, found.vae_encoder, strict=True)
    calls: dict[str, list[Inputs]] = {
        "unet": found.unet,
        "text_encoder": pipeline.texts,
        "vae": [dict(one) for pair in both for one in pair],
    }
    return {name: calls[name] for name in components}
