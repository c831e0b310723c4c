"""UNet2DConditionModel: latents, a timestep and a text become a prediction of the noise.

Rombach et al. 2022 (arXiv:2112.10752), with what later models add: linear projections (2.x), a
second text and the picture's size (XL, arXiv:2307.01952), an embedded guidance scale (LCM,
arXiv:2310.04378). Weights are read under diffusers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import RequestError
from sdvino.nets import layers as nn
from sdvino.nets.layers import Layers, UnknownNetwork, Value
from sdvino.nets.structure import Structure, wrong
from sdvino.weights.safetensors import Tensors

#: What is written here, by diffusers' keys; anything else asks for another network.
_KNOWN: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "addition_embed_type": (None, "text_time"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
#: SDXL's time_ids: original size, crop, target size.
_TIME_IDS = 6
# Beyond these a config is no Stable Diffusion model's, and would only eat memory.
_MOST_LEVELS, _MOST_LAYERS, _WIDEST = 8, 64, 8192


@dataclass(frozen=True, slots=True)
class _Level:
    """One resolution of the UNet; ``depths`` and ``cross`` are those of its way."""

    channels: int
    heads: int
    resnets: int
    #: Transformer layers of each attention, by its number; none where there is no attention.
    depths: tuple[int, ...]
    #: Whether self-attentions read the text instead.
    only_cross: bool


def unet(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    structure: Structure | None = None,
    tokens: int = 77,
) -> ov.Model:
    """Return the UNet that ``config`` (diffusers' config.json) describes, over ``tensors``.

    Inputs, in order: ``sample`` f32 [N, C, h, w], ``timestep`` i64 [1], ``encoder_hidden_states``
    f32 [N, ``tokens``, D], and where the config asks for them ``text_embeds`` [N, P] with
    ``time_ids`` [N, 6], and ``timestep_cond`` [N, G]. Output: ``out_sample`` f32 [N, C, h, w].
    ``structure`` says what passes of pruning and low rank left of it; None: the whole.
    Raises RequestError when config and tensors do not fit, UnknownNetwork for other networks.
    """
    _check(config)
    w = Layers(tensors, structure)
    down, up = _levels(config)
    sample = nn.parameter("sample", [-1, config["in_channels"], -1, -1])
    timestep = nn.parameter("timestep", [-1], ov.Type.i64)
    text = nn.parameter("encoder_hidden_states", [-1, tokens, config["cross_attention_dim"]])
    emb, extra = _embedding(w, config, timestep, down[0].channels)
    block = _Blocks(w, config, text, nn.silu(emb))

    kernel = config.get("conv_in_kernel", 3)
    x = w.conv("conv_in", sample, down[0].channels, kernel=kernel)
    skips = [x]
    for i, level in enumerate(down):
        x = block.down(f"down_blocks.{i}", x, level, skips, last=i == len(down) - 1)
    x = block.mid("mid_block", x, down[-1], config.get("mid_block_type", _MIDDLE))
    for i, level in enumerate(up):
        x = block.up(f"up_blocks.{i}", x, level, skips, last=i == len(up) - 1)
    x = nn.silu(block.norm("conv_norm_out", x))
    kernel = config.get("conv_out_kernel", 3)
    x = w.conv("conv_out", x, config.get("out_channels", 4), kernel=kernel)
    return nn.model("unet", [sample, timestep, text, *extra], {"out_sample": x}, w)


_MIDDLE = "UNetMidBlock2DCrossAttn"


class _Blocks:
    """The blocks of one UNet: what they share is its text and its time embedding."""

    def __init__(self, w: Layers, config: Mapping[str, Any], text: Value, emb: Value) -> None:
        self.w, self.text, self.emb = w, text, emb
        self.groups = int(config.get("norm_num_groups", 32))
        self.eps = float(config.get("norm_eps", 1e-5))
        self.linear_projection = bool(config.get("use_linear_projection", False))
        self.mid_scale = float(config.get("mid_block_scale_factor", 1))
        depths = _each(config.get("transformer_layers_per_block", 1), 1)
        self.mid_depth = _each(depths[-1], 1)[0]

    def down(self, name: str, x: Value, level: _Level, skips: list[Value], *, last: bool) -> Value:
        for j in range(level.resnets):
            x = self.resnet(f"{name}.resnets.{j}", x, level.channels)
            x = self.attentions(name, j, x, level)
            skips.append(x)
        if not last:
            x = self.w.conv(f"{name}.downsamplers.0.conv", x, level.channels, stride=2)
            skips.append(x)
        return x

    def mid(self, name: str, x: Value, level: _Level, kind: str | None) -> Value:
        if kind is None:
            return x
        x = self.resnet(f"{name}.resnets.0", x, level.channels, scale=self.mid_scale)
        if kind == _MIDDLE:
            x = self.transformer(f"{name}.attentions.0", x, level, self.mid_depth)
            x = self.resnet(f"{name}.resnets.1", x, level.channels, scale=self.mid_scale)
        return x

    def up(self, name: str, x: Value, level: _Level, skips: list[Value], *, last: bool) -> Value:
        for j in range(level.resnets):
            x = ops.concat([x, skips.pop()], 1, name=f"{name}.{j}/skip")
            x = self.resnet(f"{name}.resnets.{j}", x, level.channels)
            x = self.attentions(name, j, x, level)
        if not last:
            x = nn.upsample(x, like=skips[-1])
            x = self.w.conv(f"{name}.upsamplers.0.conv", x, level.channels)
        return x

    def norm(self, name: str, x: Value) -> Value:
        return self.w.group_norm(name, x, self.groups, self.eps)

    def resnet(self, name: str, x: Value, channels: int, *, scale: float = 1.0) -> Value:
        """Return x + F(x, t); of a block that was taken out its first channels are left."""
        w = self.w
        if w.removed(name):
            return _first_channels(name, x, channels)
        h = w.conv(f"{name}.conv1", nn.silu(self.norm(f"{name}.norm1", x)), channels)
        shift = w.linear(f"{name}.time_emb_proj", self.emb, channels)
        h = ops.add(h, ops.reshape(shift, [0, 0, 1, 1], True))
        h = w.conv(f"{name}.conv2", nn.silu(self.norm(f"{name}.norm2", h)), channels)
        if nn.channels_of(x) != channels:
            x = w.conv(f"{name}.conv_shortcut", x, channels, kernel=1)
        h = ops.add(x, h, name=name)
        return h if scale == 1.0 else ops.divide(h, nn.number(scale))

    def attentions(self, name: str, j: int, x: Value, level: _Level) -> Value:
        if not level.depths:
            return x
        return self.transformer(f"{name}.attentions.{j}", x, level, level.depths[j])

    def transformer(self, name: str, x: Value, level: _Level, depth: int) -> Value:
        """Return a picture after ``depth`` layers of attention among its pixels and to the text."""
        w, channels = self.w, level.channels
        if w.removed(name):
            return x
        h = w.group_norm(f"{name}.norm", x, self.groups, 1e-6)
        if self.linear_projection:
            h = w.linear(f"{name}.proj_in", nn.to_tokens(h), channels)
        else:
            h = nn.to_tokens(w.conv(f"{name}.proj_in", h, channels, kernel=1))
        for k in range(depth):
            h = self.layer(f"{name}.transformer_blocks.{k}", h, level)
        if self.linear_projection:
            h = nn.to_picture(w.linear(f"{name}.proj_out", h, channels), like=x)
        else:
            h = w.conv(f"{name}.proj_out", nn.to_picture(h, like=x), channels, kernel=1)
        return ops.add(h, x, name=name)

    def layer(self, name: str, x: Value, level: _Level) -> Value:
        w = self.w
        normed = w.layer_norm(f"{name}.norm1", x)
        other = self.text if level.only_cross else normed
        x = ops.add(self.attention(f"{name}.attn1", normed, other, level), x)
        normed = w.layer_norm(f"{name}.norm2", x)
        x = ops.add(self.attention(f"{name}.attn2", normed, self.text, level), x)
        return ops.add(self.feed_forward(f"{name}.ff", w.layer_norm(f"{name}.norm3", x)), x)

    def attention(self, name: str, x: Value, context: Value, level: _Level) -> Value:
        """Return what the tokens ``x`` find in ``context``; a pruned one has fewer heads."""
        w = self.w
        heads = w.heads(name, level.heads)
        inner = heads * nn.whole_divisor(level.channels, level.heads, name)
        q = w.linear(f"{name}.to_q", x, inner, bias=False)
        k, v = (w.linear(f"{name}.to_{part}", context, inner, bias=False) for part in "kv")
        found = nn.attention(q, k, v, heads, name=name)
        return w.linear(f"{name}.to_out.0", found, level.channels)

    def feed_forward(self, name: str, x: Value) -> Value:
        """GEGLU (arXiv:2002.05202): values times the GELU of gates, then back to the width."""
        inner = self.w.channels(name, 4 * nn.width_of(x))
        both = self.w.linear(f"{name}.net.0.proj", x, 2 * inner)
        value, gate = ops.variadic_split(both, -1, [inner, inner]).outputs()
        gated = ops.multiply(value, ops.gelu(gate, "erf"))
        return self.w.linear(f"{name}.net.2", gated, nn.width_of(x))


def _embedding(
    w: Layers, config: Mapping[str, Any], timestep: Value, channels: int
) -> tuple[Value, list[Value]]:
    """Return the embedding of the timestep and what comes with it [N, E], and further inputs."""
    wave: Callable[..., Value] = nn.sinusoid
    waves = {
        "flip_sin_to_cos": bool(config.get("flip_sin_to_cos", True)),
        "shift": float(config.get("freq_shift", 0)),
    }
    width = config.get("time_embedding_dim") or 4 * channels
    x = wave(ops.convert(timestep, "f32"), channels, **waves)
    inputs = []
    if config.get("time_cond_proj_dim") is not None:
        guidance = nn.parameter("timestep_cond", [-1, config["time_cond_proj_dim"]])
        inputs.append(guidance)
        x = ops.add(x, w.linear("time_embedding.cond_proj", guidance, channels, bias=False))
    emb = _mlp(w, "time_embedding", x, width)
    if config.get("addition_embed_type") == "text_time":
        each = config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - _TIME_IDS * each
        text_embeds = nn.parameter("text_embeds", [-1, pooled])
        time_ids = nn.parameter("time_ids", [-1, _TIME_IDS])
        inputs = [text_embeds, time_ids, *inputs]
        sizes = ops.reshape(wave(time_ids, each, **waves), [-1, _TIME_IDS * each], False)
        added = _mlp(w, "add_embedding", ops.concat([text_embeds, sizes], 1), width)
        emb = ops.add(emb, added)
    return emb, inputs


def _mlp(w: Layers, name: str, x: Value, width: int) -> Value:
    x = nn.silu(w.linear(f"{name}.linear_1", x, width))
    return w.linear(f"{name}.linear_2", x, width)


def _first_channels(name: str, x: Value, channels: int) -> Value:
    """Return what a block that was taken out hands on, as the skip goes with it."""
    if nn.channels_of(x) < channels:
        raise wrong(f"removes {name[:120]!r}, which cannot be left out")
    if nn.channels_of(x) == channels:
        return x
    return ops.slice(x, [0], [channels], [1], [1])


def _levels(config: Mapping[str, Any]) -> tuple[list[_Level], list[_Level]]:
    """Return the levels of the way down and of the way up."""
    channels = config["block_out_channels"]
    n = len(channels)
    if n > _MOST_LEVELS or not all(1 <= width <= _WIDEST for width in channels):
        raise RequestError("The UNet's config gives block_out_channels that no such model has.")
    heads, resnets, only = (
        _each(config.get(key, default), n)
        for key, default in (
            ("attention_head_dim", 8),  # diffusers means the number of heads
            ("layers_per_block", 2),
            ("only_cross_attention", False),
        )
    )
    if not all(1 <= count <= _MOST_LAYERS for count in resnets):
        raise RequestError("The UNet's config gives layers_per_block that no such model has.")
    depths = _each(config.get("transformer_layers_per_block", 1), n)
    back = config.get("reverse_transformer_layers_per_block")
    back = list(reversed(depths)) if back is None else back
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    if not len(down_types) == len(up_types) == len(back) == n:
        raise RequestError("The UNet's config names other numbers of blocks on its ways.")
    down, up = [], []
    for i in range(n):
        j = n - 1 - i
        there = _depths(depths[i], resnets[i]) if _attends(_DOWN, down_types[i]) else ()
        home = _depths(back[i], resnets[j] + 1) if _attends(_UP, up_types[i]) else ()
        down.append(_Level(channels[i], heads[i], resnets[i], there, bool(only[i])))
        up.append(_Level(channels[j], heads[j], resnets[j] + 1, home, bool(only[j])))
    return down, up


def _attends(known: Mapping[str, bool], kind: str) -> bool:
    if kind not in known:
        raise UnknownNetwork(f"a UNet with {str(kind)[:60]}")
    return known[kind]


def _depths(given: int | Sequence[int], count: int) -> tuple[int, ...]:
    return (given,) * count if isinstance(given, int) else tuple(given)


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _check(config: Mapping[str, Any]) -> None:
    """Raise UnknownNetwork for what is not written here."""
    for key, known in _KNOWN.items():
        value = config.get(key, known[0])
        if value not in known:
            raise UnknownNetwork(f"a UNet with {key} {str(value)[:60]}")
    if not isinstance(config["cross_attention_dim"], int):
        raise UnknownNetwork("a UNet with several widths of text")
