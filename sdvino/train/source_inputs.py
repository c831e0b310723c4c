"""What a source's own pipeline feeds its components, recorded before anything is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.calibration import CalibrationPlan, collect
from sdvino.compress.float_pipeline import part_of
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.text.tokenizer import ClipTokenizer
from sdvino.train.calls import call

Array = NDArray[np.float32]
Inputs = dict[str, NDArray[Any]]

# diffusers' default of AutoencoderKL, for configs from before the field existed.
_SCALING_FACTOR = 0.18215


class TorchPipeline:
    """Text encoder, UNet and VAE of a source, as `sdvino.compress.calibration` runs them."""

    def __init__(
        self,
        modules: Mapping[str, Any],
        tokenizer: Path,
        scheduler: Mapping[str, Any],
        *,
        guided: bool,
        decodes: bool,
    ) -> None:
        """``modules``: text_encoder, unet and vae, in float32; the first is enough to encode.

        ``guided``: the UNet is asked without the prompt, too; ``decodes``: pictures are wanted.
        """
        self.scheduler = SchedulerConfig.from_dict(dict(scheduler))
        self._modules = modules
        self._guided = guided
        self._decodes = decodes
        length = int(modules["text_encoder"].config.max_position_embeddings)
        self._tokenizer = ClipTokenizer.from_folder(tokenizer, length)
        vae = getattr(modules.get("vae"), "config", None)
        self._scaling = float(getattr(vae, "scaling_factor", _SCALING_FACTOR))
        #: Token ids of every prompt that was encoded.
        self.texts: list[Inputs] = []

    def encode(self, prompt: str) -> dict[str, Array]:
        """Return what the UNet is told of ``prompt``: the text encoder's hidden states."""
        ids: Inputs = {"input_ids": self._tokenizer.encode(prompt).ids}
        self.texts.append(ids)
        return {"encoder_hidden_states": self._call("text_encoder", ids)}

    def conditions(
        self, prompt: str, negative: str | None
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """Return what the UNet is told of the prompt, and of the negative one where it is asked."""
        without = "" if negative is None else negative
        return self.encode(prompt), self.encode(without) if self._guided else None

    def predict(self, inputs: Sequence[Mapping[str, NDArray[Any]]]) -> list[Array]:
        """Return the UNet's outputs for latents [1, C, h, w], timestep [1] and conditions each."""
        return [self._call("unet", given) for given in inputs]

    def decode(self, latents: Array, index: int) -> tuple[Array, Array]:
        """Return the decoder's input for scaled ``latents``, and its picture, NCHW in [-1, 1].

        Of latents larger than a tile it is a tile, another for each ``index``.
        """
        fed = part_of(latents, index) / np.float32(self._scaling)
        if not self._decodes:
            return fed, np.zeros((1, 3, 1, 1), np.float32)
        return fed, self._call("vae", {"latent_sample": fed})

    def _call(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Array:
        return np.asarray(call(self._modules[name], inputs).numpy(), np.float32)


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
