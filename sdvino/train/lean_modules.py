"""The torch modules that a smaller component is made of, and how layers are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class PassThrough(nn.Module):  # type: ignore[misc]
    """Stands where a residual block was: only the residual goes on.

    In a UNet's way up the block was fed the states with the skip behind them; the skip goes too.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the first channels of ``hidden_states``, NCHW."""
        return hidden_states[:, : self.channels]


class NoAttention(nn.Module):  # type: ignore[misc]
    """Stands where a block of transformers was."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> tuple[Any]:
        """Return ``hidden_states`` as the block returned its own: in a tuple."""
        return (hidden_states,)


class LowRank(nn.Module):  # type: ignore[misc]
    """A linear layer or convolution as two: ``down`` to the rank, ``up`` to the outputs."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Any) -> Any:
        """Return up(down(x))."""
        return self.up(self.down(x))


def low_rank_like(layer: nn.Module, rank: int) -> LowRank:
    """Return two layers in the place of ``layer``, on its device, their weights not set.

    A convolution becomes k x k to ``rank`` channels, with its stride and padding, then 1 x 1.
    """
    bias = layer.bias is not None
    kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return LowRank(
            nn.Linear(layer.in_features, rank, bias=False, **kind),
            nn.Linear(rank, layer.out_features, bias=bias, **kind),
        )
    down = nn.Conv2d(
        layer.in_channels,
        rank,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
        **kind,
    )
    return LowRank(down, nn.Conv2d(rank, layer.out_channels, 1, bias=bias, **kind))


def can_be_low_rank(module: nn.Module) -> bool:
    """Tell whether `low_rank_like` knows ``module``."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def keep_outputs(linear: nn.Linear, kept: Sequence[int] | slice) -> None:
    """Leave only the outputs ``kept`` of ``linear``, in place."""
    linear.weight = _cut(linear.weight, kept)
    if linear.bias is not None:
        linear.bias = _cut(linear.bias, kept)
    linear.out_features = linear.weight.shape[0]


def keep_inputs(linear: nn.Linear, kept: Sequence[int] | slice) -> None:
    """Leave only the inputs ``kept`` of ``linear``, in place."""
    linear.weight = nn.Parameter(linear.weight.detach()[:, kept].contiguous(), requires_grad=False)
    linear.in_features = linear.weight.shape[1]


def _cut(parameter: Any, kept: Sequence[int] | slice) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[kept].contiguous(), requires_grad=False)


def keep_heads(attention: Any, heads: Sequence[int]) -> None:
    """Leave only ``heads`` of diffusers' Attention, in place."""
    width = attention.to_q.out_features // attention.heads
    kept = [head * width + i for head in heads for i in range(width)]
    for name in ("to_q", "to_k", "to_v"):
        keep_outputs(getattr(attention, name), kept)
    keep_inputs(attention.to_out[0], kept)
    attention.heads = attention.sliceable_head_dim = len(heads)
    attention.inner_dim = attention.inner_kv_dim = len(kept)


def keep_channels(feed_forward: Any, channels: Sequence[int]) -> None:
    """Leave only ``channels`` between the two layers of diffusers' FeedForward, in place."""
    first, last = feed_forward.net[0].proj, feed_forward.net[2]
    rows = list(channels)
    if first.out_features == 2 * last.in_features:  # GEGLU: values, then gates
        rows += [last.in_features + channel for channel in channels]
    keep_outputs(first, rows)
    keep_inputs(last, list(channels))


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name`` below ``root``."""
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
