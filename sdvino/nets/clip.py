"""CLIP's text model, with and without the projection (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.nets import layers as nn
from sdvino.nets.layers import Layers, UnknownNetwork, Value
from sdvino.nets.structure import Structure
from sdvino.weights.safetensors import Tensors

#: What CLIPTextConfig leaves out.
_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
# Configs of older transformers say 2, and mean the largest id of a text.
_OLD_END = 2


def clip(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    structure: Structure | None = None,
    projection: bool = False,
    hidden_states: bool = False,
) -> ov.Model:
    """Return the text model that ``config`` (transformers' CLIPTextConfig) describes.

    Input: ``input_ids`` i64 [N, T]. Outputs, f32: ``last_hidden_state`` [N, T, D] and
    ``pooler_output`` [N, D]; with ``projection`` ``text_embeds`` [N, P] and ``last_hidden_state``.
    With ``hidden_states`` also ``hidden_states.0`` (the embeddings) and on, [N, T, D].
    ``structure`` says what low rank left of it.
    Raises RequestError when config and tensors do not fit, UnknownNetwork for other networks.
    """
    config = {**_DEFAULTS, **config}
    # Merged checkpoints may carry a projection that the model has no use for.
    own = {k: t for k, t in tensors.items() if projection or not k.startswith("text_projection")}
    w = Layers(own, structure)
    width, name = config["hidden_size"], "text_model"
    ids = nn.parameter("input_ids", [-1, -1], ov.Type.i64)
    states = [_embed(w, f"{name}.embeddings", ids, width)]
    for i in range(config["num_hidden_layers"]):
        states.append(_layer(w, f"{name}.encoder.layers.{i}", states[-1], config))
    last = w.layer_norm(f"{name}.final_layer_norm", states[-1], config["layer_norm_eps"])
    pooled = _at_end(last, ids, config["eos_token_id"])
    outputs: dict[str, Value]
    if projection:
        embeds = w.linear("text_projection", pooled, config["projection_dim"], bias=False)
        outputs = {"text_embeds": embeds, "last_hidden_state": last}
    else:
        outputs = {"last_hidden_state": last, "pooler_output": pooled}
    if hidden_states:
        outputs |= {f"hidden_states.{i}": state for i, state in enumerate(states)}
    return nn.model("text_encoder", [ids], outputs, w)


def _embed(w: Layers, name: str, ids: Value, width: int) -> Value:
    """Return each token's vector plus that of its place."""
    tokens = w.table(f"{name}.token_embedding.weight", width)
    places = w.table(f"{name}.position_embedding.weight", width)
    length = ops.gather(ops.shape_of(ids), np.int64(1), np.int64(0))
    counted = ops.range(np.int64(0), length, np.int64(1), "i64")
    x = ops.gather(tokens, ids, np.int64(0), name=f"{name}.token_embedding")
    y = ops.gather(places, counted, np.int64(0), name=f"{name}.position_embedding")
    return ops.add(x, ops.unsqueeze(y, np.int64(0)), name=name)


def _layer(w: Layers, name: str, x: Value, config: Mapping[str, Any]) -> Value:
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    width = config["hidden_size"]
    nn.whole_divisor(width, heads, name)
    h = w.layer_norm(f"{name}.layer_norm1", x, eps)
    own = f"{name}.self_attn"
    q, k, v = (w.linear(f"{own}.{part}_proj", h, width) for part in "qkv")
    found = nn.attention(q, k, v, heads, name=own, causal=True)
    x = ops.add(w.linear(f"{own}.out_proj", found, width), x, name=f"{own}/residual")
    h = w.layer_norm(f"{name}.layer_norm2", x, eps)
    h = _activation(
        config["hidden_act"], w.linear(f"{name}.mlp.fc1", h, config["intermediate_size"])
    )
    return ops.add(w.linear(f"{name}.mlp.fc2", h, width), x, name=name)


def _activation(kind: str, x: Value) -> Value:
    if kind == "quick_gelu":
        return ops.swish(x, nn.number(1.702))
    if kind == "gelu":
        return ops.gelu(x, "erf")
    raise UnknownNetwork(f"a text encoder with hidden_act {str(kind)[:60]}")


def _at_end(states: Value, ids: Value, end: int) -> Value:
    """Return the state of each text's first end token, [N, D]."""
    marks = ids if end == _OLD_END else ops.convert(ops.equal(ids, np.int64(end)), "i32")
    first = ops.topk(marks, np.int64(1), 1, "max", "value", stable=True, index_element_type="i64")
    place = ops.squeeze(first.output(1), np.int64(1))
    return ops.gather(states, place, np.int64(1), batch_dims=1)
