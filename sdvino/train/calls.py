"""How the components of a source are called: with what, and what each of their layers costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.nets.structure import Structure
from sdvino.train.modules import build

Inputs = Mapping[str, NDArray[Any]]

# Sizes that a graph is traced at: the layers are the same at every size.
_TRACED_LATENTS = 16
_TRACED_PICTURE = 64
_TOKENS = 77


def example_inputs(component: str, module: Any, side: int | None = None) -> dict[str, Any]:
    """Return arguments of ``module``'s forward, zeros: all of its layers run.

    ``side``: of the latents, or of a VAE's picture; None: a small one.
    """
    import torch

    config = module.config
    if component.startswith("text_encoder"):
        tokens = min(_TOKENS, int(config.max_position_embeddings))
        return {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    if component == "vae":
        side = _TRACED_PICTURE if side is None else side
        return {"sample": torch.zeros(1, int(config.in_channels), side, side)}
    side = _TRACED_LATENTS if side is None else side
    width = config.cross_attention_dim
    width = int(width[-1] if isinstance(width, Sequence) else width)
    inputs: dict[str, Any] = {
        "sample": torch.zeros(1, int(config.in_channels), side, side),
        "timestep": torch.ones(1, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(1, _TOKENS, width),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6 * int(config.addition_time_embed_dim)
        pooled = int(config.projection_class_embeddings_input_dim) - sizes
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled),
            "time_ids": torch.zeros(1, 6),
        }
    return inputs


def call(module: Any, inputs: Inputs) -> Any:
    """Return the output of ``module`` for one recorded call, a float32 tensor, without gradients.

    unet: sample, timestep, encoder_hidden_states; text encoders: input_ids; vae: latent_sample is
    decoded, sample is encoded to the mean of its latents.
    """
    import torch

    values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    with torch.no_grad():
        if "latent_sample" in values:
            return module.decode(values["latent_sample"]).sample
        if "timestep" in values:
            return module(**values).sample
        if "sample" in values:
            return module.encode(values["sample"]).latent_dist.mean
        return module(**values).last_hidden_state


def outputs_of(module: Any, inputs: Sequence[Inputs]) -> list[Any]:
    """Return the output of each call."""
    return [call(module, sample) for sample in inputs]


def relative_error(outputs: Sequence[Any], references: Sequence[Any]) -> float:
    """Return ||output - reference|| / ||reference|| over all calls together."""
    pairs = zip(outputs, references, strict=True)
    apart = sum(float((one - other).double().square().sum()) for one, other in pairs)
    whole = sum(float(other.double().square().sum()) for other in references)
    return float((apart / max(whole, 1e-30)) ** 0.5)


def operations(component: str, config: Mapping[str, Any], structure: Structure) -> dict[str, int]:
    """Return multiplications and additions, as pairs, by layer, for one call at its own size.

    Nothing is computed: torch's meta device knows shapes alone. Layers are linear ones and
    convolutions by name, and the two products of each attention, under the attention's name.
    """
    import torch

    module = build(component, config, structure)
    counts: dict[str, int] = {}
    for name, layer in module.named_modules():
        counter = _counter(layer, name, counts)
        if counter is not None:
            layer.register_forward_hook(counter, with_kwargs=True)
    side = None if component.startswith("text") else int(config.get("sample_size", 64))
    with torch.device("meta"), torch.no_grad():
        module(**example_inputs(component, module, side))
    return counts


def _counter(layer: Any, name: str, counts: dict[str, int]) -> Callable[..., None] | None:
    from torch import nn

    def add(count: int) -> None:
        counts[name] = counts.get(name, 0) + count

    def dense(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        add(output.numel() * module.weight[0].numel())

    def attention(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states")
        queries = states[0, 0].numel() if states.ndim == 4 else states.shape[1]
        keys = queries if context is None else context.shape[1]
        add(2 * states.shape[0] * queries * keys * module.inner_dim)

    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        return dense
    return attention if type(layer).__name__ == "Attention" else None
