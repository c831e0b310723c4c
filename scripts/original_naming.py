"""Checkpoints in the original naming (LDM, SGM), made from diffusers' modules.

The inverse of what is tested: diffusers' own tables say what is called what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

State = dict[str, Any]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_to_ldm(state: State, config: Mapping[str, Any]) -> State:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    table = {**DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]}
    table |= DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    step = config["layers_per_block"] + 1
    result = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
        if name in table:
            new = table[name]
        elif name.startswith("mid_block."):
            middle = re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", name)
            assert middle is not None, name
            kind, number, rest = middle.groups()
            if kind == "attentions":
                new = f"middle_block.1.{rest}"
            else:
                new = f"middle_block.{2 * int(number)}.{resnet(rest)}"
        else:
            assert match is not None, name
            way, level, kind, layer, rest = match.groups()
            new = block(way, level, kind, layer, rest, step, config)
        result[f"model.diffusion_model.{new}"] = tensor
    return result


def block(
    way: str, level: str, kind: str, layer: str, rest: str, step: int, config: Mapping[str, Any]
) -> str:
    first = int(level) * step + int(layer)
    if way == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * step}.0.op.{rest.removeprefix('conv.')}"
        number = f"input_blocks.{first + 1}"
    else:
        if kind == "upsamplers":
            attends = "CrossAttn" in config["up_block_types"][int(level)]
            return f"output_blocks.{first + step - 1}.{2 if attends else 1}.{rest}"
        number = f"output_blocks.{first}"
    return f"{number}.1.{rest}" if kind == "attentions" else f"{number}.0.{resnet(rest)}"


def resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{RESNET[part]}.{kind}"


def vae_to_ldm(state: State, config: Mapping[str, Any]) -> State:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    table = DIFFUSERS_TO_LDM_MAPPING["vae"]
    last = len(config["block_out_channels"]) - 1
    result = {}
    for name, tensor in state.items():
        if name in table:
            result[f"first_stage_model.{table[name]}"] = tensor
            continue
        half, rest = name.split(".", 1)
        attention = re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest)
        if attention is not None:
            part = VAE_ATTENTION[attention[1]]
            new = f"mid.attn_1.{part}.{attention[2]}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        else:
            new = rest.replace("conv_shortcut", "nin_shortcut").replace("samplers.0.", "sample.")
            new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
            new = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", new)
            new = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{last - int(m[1])}.", new)
            new = new.replace(".resnets.", ".block.")
        result[f"first_stage_model.{half}.{new}"] = tensor
    return result


def clip_to_ldm(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def clip_to_open_clip(state: State, prefix: str, *, extra_layer: bool) -> State:
    """With ``extra_layer``, add the last layer and the projection that SD 2.x does not use."""
    import torch
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    layers = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    result: State = {}
    for name, tensor in state.items():
        if name in layers:
            new = layers[name]
            result[new] = tensor.T.contiguous() if new == "text_projection" else tensor
            continue
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert match is not None, name
        layer = f"transformer.resblocks.{match[1]}"
        if match[2] in parts:
            result[f"{layer}.{parts[match[2]]}.{match[3]}"] = tensor
        elif match[2] == "self_attn.q_proj":
            rows = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[f"{layer}.attn.in_proj_{match[3]}"] = torch.cat(rows)
    if extra_layer:
        count = len({name.split(".")[2] for name in result if "resblocks" in name})
        last = f"transformer.resblocks.{count - 1}."
        result |= {
            name.replace(last, f"transformer.resblocks.{count}."): tensor + 1
            for name, tensor in result.items()
            if name.startswith(last)
        }
        width = result["ln_final.weight"].shape[0]
        result["text_projection"] = torch.zeros(width, width, dtype=torch.float16)
    result["logit_scale"] = torch.tensor(4.6, dtype=torch.float16)
    return {f"{prefix}{name}": tensor for name, tensor in result.items()}


def original_state(folder: Path, plan: Mapping[str, Any], load: Any) -> State:
    """Return the whole checkpoint of a diffusers folder; ``load`` reads a component's tensors."""
    import torch

    components = plan["components"]
    unet, vae = components["unet"][2], components["vae"][2]
    state = unet_to_ldm(load(folder / "unet"), {**_UNET_DEFAULTS, **unet})
    state |= vae_to_ldm(load(folder / "vae"), vae)
    text = load(folder / "text_encoder")
    if "text_encoder_2" in components:
        state |= clip_to_ldm(text, "conditioner.embedders.0.transformer.")
        second = load(folder / "text_encoder_2")
        state |= clip_to_open_clip(second, "conditioner.embedders.1.model.", extra_layer=False)
        ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    elif components["text_encoder"][2]["hidden_act"] == "gelu":
        state |= clip_to_open_clip(text, "cond_stage_model.model.", extra_layer=True)
        ids = "cond_stage_model.ids"
    else:
        state |= clip_to_ldm(text, "cond_stage_model.transformer.")
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    # What stands in such files beside the weights.
    state[ids] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    state["model_ema.decay"] = torch.tensor(0.9999)
    return state


_UNET_DEFAULTS: Mapping[str, Any] = {
    "layers_per_block": 2,
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ],
}
