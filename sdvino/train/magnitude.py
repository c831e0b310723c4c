"""Masks of magnitude pruning: NNCF's, and the same ones in a few megabytes.

NNCF puts every weight into one tensor and takes its k-th value: 12 bytes an element, over 10 GB at
Stable Diffusion's size. But floats that are not negative are ordered as their bits are: a
histogram of the upper 16 bits finds where the k-th value lies, a second one of the lower 16 bits
within that place finds the value itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from sdvino.compress.quiet import quiet
from sdvino.errors import SdvinoError

Scope = Literal["local", "global"]
#: Name of the parameter -> what is to stay, True, or go, False.
Masks = Iterator[tuple[str, Any]]

_NNCF_BYTES_PER_WEIGHT = 12
_HOOKS = "__nncf_hooks"
# Elements that are counted at a time: eight bytes each while they are.
_CHUNK = 2**22


def nncf_needs(weights: int) -> int:
    """Return the bytes that NNCF takes, beside the model, to prune so many weights."""
    return _NNCF_BYTES_PER_WEIGHT * weights


def layers_with_weights(module: Any) -> dict[str, Any]:
    """Return the weights of linear layers, convolutions and embeddings, by parameter name."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {
        f"{name}.weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, kinds)
    }


def nncf_masks(
    module: Any, component: str, layers: Mapping[str, Any], share: float, scope: Scope
) -> Masks:
    """Yield the masks that ``nncf.prune`` gives the ``layers`` of ``module``, which stays whole."""
    import nncf

    from sdvino.train.calls import example_inputs

    modes = nncf.PruneMode
    mode = (
        modes.UNSTRUCTURED_MAGNITUDE_GLOBAL
        if scope == "global"
        else modes.UNSTRUCTURED_MAGNITUDE_LOCAL
    )
    others = [name for name in layers_with_weights(module) if name not in layers]
    with quiet():
        wrapped = nncf.prune(
            module,
            mode,
            ratio=share,
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            examples_inputs=example_inputs(component, module),
        )
    found = {
        _parameter_of(name): mask
        for name, mask in wrapped.named_buffers()
        if name.startswith(_HOOKS) and name.endswith("binary_mask")
    }
    _unwrap(module)
    missing = sorted(set(layers) - set(found))
    if missing:
        raise SdvinoError(f"NNCF left {missing[0]} out while pruning; report this model.")
    for name in layers:
        yield name, found[name]


def _parameter_of(hook: str) -> str:
    """Return the parameter that a mask of NNCF's hooks is for: a:b:weight__0 is a.b.weight."""
    return hook.split(".")[2].rpartition("__")[0].replace(":", ".")


def _unwrap(module: Any) -> None:
    """Take NNCF's hooks off again; its own `strip` wants torchao, and the masks are applied here.

    It sets two attributes of the instance, in front of the class's, and adds a module.
    """
    for name in ("forward", "_replicate_for_data_parallel"):
        module.__dict__.pop(name, None)
    module._modules.pop(_HOOKS, None)


def histogram_masks(layers: Mapping[str, Any], share: float, scope: Scope) -> Masks:
    """Yield the masks that NNCF would give, one at a time, from histograms.

    Local: elements above the (1 + int((n - 1) share))-th smallest magnitude of their layer stay.
    Global: the same over all layers, each divided by its Euclidean norm.
    """
    if scope == "local":
        for name, weight in layers.items():
            magnitude = weight.detach().abs()
            threshold = kth_value(partial(_alone, magnitude), _place(weight.numel(), share))
            yield name, magnitude > threshold
        return

    def scaled() -> Iterator[Any]:
        for weight in layers.values():
            yield _scaled(weight)

    total = sum(weight.numel() for weight in layers.values())
    threshold = kth_value(scaled, _place(total, share))
    for name, weight in layers.items():
        yield name, _scaled(weight) > threshold


def _alone(tensor: Any) -> Iterator[Any]:
    yield tensor


def kth_value(tensors: Callable[[], Iterator[Any]], k: int) -> float:
    """Return the ``k``-th smallest (from 1) of all elements, float32 and none of them negative.

    ``tensors`` gives them anew for each of two passes. Exact, in memory that their number does not
    change.
    """
    upper = _histogram(tensors, lambda bits: bits >> 16)
    bucket, before = _bucket(upper, k)
    lower = _histogram(tensors, lambda bits: (bits[(bits >> 16) == bucket]) & 0xFFFF)
    low, _ = _bucket(lower, k - before)
    import torch

    return float(torch.tensor([(bucket << 16) | low], dtype=torch.int32).view(torch.float32)[0])


def _histogram(tensors: Callable[[], Iterator[Any]], key: Callable[[Any], Any]) -> Any:
    import torch

    counts = torch.zeros(2**16, dtype=torch.int64)
    for tensor in tensors():
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            bits = chunk.contiguous().view(torch.int32)
            counts += torch.bincount(key(bits), minlength=2**16)
    return counts


def _bucket(counts: Any, k: int) -> tuple[int, int]:
    """Return the bucket that holds the ``k``-th element, and how many are in those before it."""
    import torch

    total = counts.cumsum(0)
    bucket = int(torch.searchsorted(total, k))
    return bucket, int(total[bucket] - counts[bucket])


def _place(elements: int, share: float) -> int:
    return int((elements - 1) * share) + 1


def _scaled(weight: Any) -> Any:
    """Return magnitudes divided by the layer's norm, in NNCF's order of operations."""
    data = weight.detach()
    return data.abs() / data.norm(2)
