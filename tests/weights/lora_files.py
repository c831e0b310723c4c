"""LoRA files of every layout, made from factors for the layers of a torch module."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 4


@dataclass
class Factors:
    """What one layer's part of a LoRA is made of; float32."""

    down: Any
    up: Any
    alpha: float
    mid: Any = None
    magnitude: Any = None

    def delta(self) -> Any:
        """What is added to the weight at weight 1, worked out by running the layers of the LoRA.

        [out, in, h, w] or [out, in]; each input channel, at each place of the kernel, is one
        picture with a single 1 in it.
        """
        scale = self.alpha / self.down.shape[0]
        if self.down.ndim == 2 and self.up.ndim == 2:
            return scale * (self.up @ self.down)
        down = self.down if self.down.ndim == 4 else self.down[..., None, None]
        up = self.up if self.up.ndim == 4 else self.up[..., None, None]
        kernel = down.shape[-1] if self.mid is None else self.mid.shape[-1]
        channels = down.shape[1]
        pictures = torch.eye(channels * kernel**2).reshape(-1, channels, kernel, kernel)
        answer = torch.nn.functional.conv2d(pictures, down)
        if self.mid is not None:
            answer = torch.nn.functional.conv2d(answer, self.mid)
        answer = torch.nn.functional.conv2d(answer, up)
        return scale * answer.reshape(channels, kernel, kernel, -1).permute(3, 0, 1, 2)


@dataclass
class Model:
    """Modules by component, and the factors for some of their layers."""

    modules: dict[str, Any]
    factors: dict[str, dict[str, Factors]] = field(default_factory=dict)

    def weights(self, component: str) -> dict[str, Any]:
        """Copies of the weights that a LoRA can change, by layer."""
        return layers_of(self.modules[component])

    def expected(self, component: str, weight: float = 1.0) -> dict[str, Any]:
        """The weights after a merge, by hand."""
        result = self.weights(component)
        for layer, factors in self.factors.get(component, {}).items():
            before = result[layer]
            result[layer] = before + weight * factors.delta().reshape(before.shape)
        return result


def layers_of(module: Any) -> dict[str, Any]:
    return {
        name.removesuffix(".weight"): value.detach().clone()
        for name, value in module.named_parameters()
        if name.endswith(".weight") and value.ndim in (2, 4) and "embedding.weight" not in name
    }


def random_factors(
    modules: Mapping[str, Any],
    seed: int = 0,
    *,
    take: Callable[[str], bool] = lambda layer: True,
    rank: int = RANK,
    locon: bool = False,
) -> dict[str, dict[str, Factors]]:
    """Small random factors for the layers that ``take`` accepts; ``locon`` splits 3 x 3 kernels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return 0.3 * torch.randn(shape, generator=generator)

    found: dict[str, dict[str, Factors]] = {}
    for component, module in modules.items():
        for number, (layer, weight) in enumerate(layers_of(module).items()):
            if not take(layer):
                continue
            mid = None
            up = normal(weight.shape[0], rank, *[1] * (weight.ndim - 2))
            down = normal(rank, *weight.shape[1:])
            if locon and weight.ndim == 4 and weight.shape[-1] == 3:
                down, mid = normal(rank, weight.shape[1], 1, 1), normal(rank, rank, 3, 3)
            # Some alphas are not the rank, and differ between layers.
            alpha = float((rank, rank / 2, 1.0)[number % 3])
            found.setdefault(component, {})[layer] = Factors(down, up, alpha, mid)
    return found


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def in_text_model(component: str, layer: str) -> str:
    """The layer as files name it: transformers 5 has no ``text_model`` in a CLIPTextModel."""
    if component == "unet" or layer.startswith("text_model.") or layer == "text_projection":
        return layer
    return f"text_model.{layer}"


def kohya(
    factors: Mapping[str, Mapping[str, Factors]],
    prefixes: Mapping[str, str] = KOHYA,
    rename: Callable[[str], str] = lambda layer: layer,
) -> dict[str, Any]:
    """The layout of kohya's trainers: one flat name, and an alpha for each layer."""
    tensors = {}
    for component, layers in factors.items():
        for layer, part in layers.items():
            name = rename(in_text_model(component, layer)).replace(".", "_")
            stem = f"{prefixes[component]}_{name}"
            tensors[f"{stem}.lora_down.weight"] = part.down
            tensors[f"{stem}.lora_up.weight"] = part.up
            tensors[f"{stem}.alpha"] = torch.tensor(part.alpha)
            if part.mid is not None:
                tensors[f"{stem}.lora_mid.weight"] = part.mid
            if part.magnitude is not None:
                tensors[f"{stem}.dora_scale"] = part.magnitude
    return tensors


def peft(
    factors: Mapping[str, Mapping[str, Factors]], *, prefix: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """The layout of diffusers with PEFT, and the metadata that holds its alphas."""
    tensors = {}
    config: dict[str, Any] = {}
    for component, layers in factors.items():
        own = f"{component}." if prefix else ""
        pattern = {}
        for layer, part in layers.items():
            stem = f"{own}{in_text_model(component, layer)}"
            tensors[f"{stem}.lora_A.weight"] = part.down
            tensors[f"{stem}.lora_B.weight"] = part.up
            if part.alpha != RANK:
                pattern[in_text_model(component, layer)] = part.alpha
            if part.magnitude is not None:
                tensors[f"{stem}.lora_magnitude_vector"] = part.magnitude
        options: dict[str, Any] = {
            "r": RANK,
            "lora_alpha": RANK,
            "alpha_pattern": pattern,
            "rank_pattern": {},
            "target_modules": [in_text_model(component, layer) for layer in layers],
        }
        config |= {f"{own}{name}": value for name, value in options.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(config), "format": "pt"}


def without_alphas(
    factors: Mapping[str, Mapping[str, Factors]],
) -> dict[str, dict[str, Factors]]:
    """The same factors for layouts that cannot say an alpha."""
    return {
        component: {
            layer: Factors(p.down, p.up, float(p.down.shape[0]), p.mid, p.magnitude)
            for layer, p in layers.items()
        }
        for component, layers in factors.items()
    }


def diffusers_old(factors: Mapping[str, Mapping[str, Factors]]) -> dict[str, Any]:
    """``unet.LAYER.lora.down.weight``, and ``lora_linear_layer`` in text encoders."""
    tensors = {}
    for component, layers in factors.items():
        word = "lora" if component == "unet" else "lora_linear_layer"
        for layer, part in layers.items():
            stem = f"{component}.{in_text_model(component, layer)}.{word}"
            tensors[f"{stem}.down.weight"] = part.down
            tensors[f"{stem}.up.weight"] = part.up
    return tensors


def processors(factors: Mapping[str, Mapping[str, Factors]], *, prefix: bool) -> dict[str, Any]:
    """The oldest layout of diffusers: attention alone, in its processors."""
    words = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for component, layers in factors.items():
        own = f"{component}." if prefix else ""
        for layer, part in layers.items():
            stem, _, last = in_text_model(component, layer).removesuffix(".0").rpartition(".")
            name = f"{stem}.processor.{last}" if component == "unet" else f"{stem}.{words[last]}"
            tensors[f"{own}{name}_lora.down.weight"] = part.down
            tensors[f"{own}{name}_lora.up.weight"] = part.up
    return tensors


_SDXL_BLOCKS = {
    # Written down by hand for SDXL's UNet of three levels and two resnets each.
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNETS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sdxl_original(layer: str) -> str:
    """The name that the original code of SDXL gives to a layer of diffusers' UNet."""
    for ours, theirs in sorted(_SDXL_BLOCKS.items(), key=lambda pair: -len(pair[0])):
        if layer == ours or layer.startswith(f"{ours}."):
            rest = layer[len(ours) :]
            if re.search(r"resnets\.\d+$", ours):
                rest = "." + _RESNETS[rest[1:]]
            return theirs + rest
    return layer  # a text encoder's


def save(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def largest_error(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def changed(found: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    return {name for name, value in before.items() if not bool(torch.equal(found[name], value))}
