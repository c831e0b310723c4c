"""What a LoRA file does to one layer, worked out from the factors that it keeps.

LoRA: up @ down (arXiv:2106.09685, section 4.1). LoCon: the same for convolutions, with a middle
one that has the kernel. LoHa: (w1_a @ w1_b) * (w2_a @ w2_b) (arXiv:2108.06098). LoKr: the Kronecker
product of w1 and w2, each of which may be a product itself (arXiv:2212.10650). Any of them may come
with DoRA's lengths (arXiv:2402.09353). LyCORIS (arXiv:2309.14859) names the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.weights.numbers import as_float32
from sdvino.weights.safetensors import Shape, Tensor

Array = NDArray[np.float32]

_MAX_RANK = 8192
# Factors of each kind that must be there.
_LORA, _LOHA = {"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
#: Roles of tensors that are no factors.
BESIDE = ("alpha", "magnitude")


class NoPart(ValueError):
    """The tensors for a layer are not whole, or their shapes cannot be."""


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What a file does to one layer."""

    component: str
    #: See `sdvino.weights.layouts.lora`.
    spelling: str
    #: The names of its tensors in the file.
    names: tuple[str, ...]
    #: down, up, mid, magnitude, hada_w1_a ... -> tensor.
    factors: Mapping[str, Tensor]
    #: alpha / rank.
    scale: float

    @property
    def shape(self) -> Shape:
        """Return (out, in), (out, in, h, w) or (out, in h w): what `change` is before it is formed.

        Raises NoPart for factors whose shapes do not go together.
        """
        return shape_of(self.factors)

    def fits(self, weight: Shape) -> bool:
        """Tell whether the part can change a layer's ``weight``.

        1 x 1 convolutions and linear layers are alike.
        """
        shape = self.shape
        flat = "down" not in self.factors and shape == (weight[0], math.prod(weight[1:]))
        alike = shape[2:] == weight[2:] or set(shape[2:] + weight[2:]) <= {1}
        if not flat and (shape[:2] != weight[:2] or not alike):
            return False
        magnitude = self.factors.get("magnitude")
        if magnitude is None:
            return True
        wide = len(magnitude.shape) > 1 and magnitude.shape[0] == 1  # one for each input
        return magnitude.size == weight[1 if wide and weight[0] != 1 else 0]

    def change(self, weight: Array) -> Array:
        """Return what is added to ``weight`` at weight 1, in its shape."""
        factors = {role: as_float32(tensor) for role, tensor in self.factors.items()}
        change: Array = (np.float32(self.scale) * _product(factors)).reshape(weight.shape)
        if "magnitude" in factors:
            change = _with_magnitude(weight + change, factors["magnitude"]) - weight
        return change


def is_whole(roles: Set[str]) -> bool:
    """Tell whether tensors of these ``roles`` are all that a part takes."""

    def whole(stem: str) -> bool:
        return stem in roles or {f"{stem}_a", f"{stem}_b"} <= roles

    return roles >= _LORA or roles >= _LOHA or (whole("lokr_w1") and whole("lokr_w2"))


def shape_of(factors: Mapping[str, Tensor]) -> Shape:
    """Return the shape that the product of ``factors`` has; raises NoPart."""
    shapes = {role: tensor.shape for role, tensor in factors.items() if role not in BESIDE}
    if any(0 in shape or len(shape) not in (2, 4) for shape in shapes.values()):
        raise NoPart
    if shapes.keys() >= _LORA:
        return _lora_shape(shapes)
    if shapes.keys() >= _LOHA:
        first, second = (_pair_shape(shapes, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        if first != second:
            raise NoPart
        return first
    first, second = _kron_shape(shapes, "lokr_w1"), _kron_shape(shapes, "lokr_w2")
    if len(first) != 2:
        raise NoPart
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def rank_of(factors: Mapping[str, Tensor]) -> int | None:
    """Return the rank that alpha is divided by, None where the factors have none."""
    for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if role in factors:
            return factors[role].shape[axis]
    return None


def _lora_shape(shapes: Mapping[str, Shape]) -> Shape:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    rank = _rank(down[0])
    if up[1] != rank or not set(up[2:]) <= {1}:
        raise NoPart
    if mid is None:
        return (up[0], *down[1:])
    # LoCon's 3 x 3: down and up are 1 x 1, and the middle one has the kernel.
    if len(mid) != 4 or mid[:2] != (rank, rank) or not set(down[2:]) <= {1}:
        raise NoPart
    return (up[0], down[1], *mid[2:])


def _pair_shape(shapes: Mapping[str, Shape], stem: str, core: str) -> Shape:
    """Return the shape of the product of ``stem``_a and ``stem``_b, over a ``core`` perhaps."""
    if not {f"{stem}_a", f"{stem}_b"} <= shapes.keys():
        raise NoPart
    a, b, t = shapes[f"{stem}_a"], shapes[f"{stem}_b"], shapes.get(core)
    if len(a) != 2 or len(b) != 2:
        raise NoPart
    if t is not None:  # Tucker's: both are transposed, and the core has the kernel
        if len(t) != 4 or t[:2] != (_rank(a[0]), _rank(b[0])):
            raise NoPart
        return (a[1], b[1], *t[2:])
    if a[1] != _rank(b[0]):
        raise NoPart
    return (a[0], b[1])


def _kron_shape(shapes: Mapping[str, Shape], stem: str) -> Shape:
    if stem in shapes:
        return shapes[stem]
    return _pair_shape(shapes, stem, stem.replace("_w", "_t"))


def _rank(rank: int) -> int:
    if not 1 <= rank <= _MAX_RANK:
        raise NoPart
    return rank


def _product(factors: Mapping[str, Array]) -> Array:
    if "down" in factors:
        up, down = (factors[role].reshape(len(factors[role]), -1) for role in ("up", "down"))
        if "mid" not in factors:
            return up @ down
        return _einsum("or,rshw,si->oihw", up, factors["mid"], down)
    if "hada_w1_a" in factors:
        product: Array = _pair(factors, "hada_w1", "hada_t1") * _pair(factors, "hada_w2", "hada_t2")
        return product
    first, second = (
        factors[stem] if stem in factors else _pair(factors, stem, stem.replace("_w", "_t"))
        for stem in ("lokr_w1", "lokr_w2")
    )
    kron: Array = np.kron(first.reshape(first.shape + (1,) * (second.ndim - 2)), second)
    return kron


def _pair(factors: Mapping[str, Array], stem: str, core: str) -> Array:
    a, b = factors[f"{stem}_a"], factors[f"{stem}_b"]
    return _einsum("xyhw,xo,yi->oihw", factors[core], a, b) if core in factors else a @ b


def _einsum(subscripts: str, *arrays: Array) -> Array:
    result: Array = np.einsum(subscripts, *arrays, optimize=True)
    return result


def _with_magnitude(direction: Array, magnitude: Array) -> Array:
    """Return ``direction`` with its vectors scaled to DoRA's lengths: a row's, or a column's.

    LyCORIS once learnt one length for each input, everyone else learns one for each output.
    """
    count = direction.shape[0]
    rows = magnitude.ndim < 2 or magnitude.shape[0] == count
    axis = 0 if rows else 1
    others = tuple(i for i in range(direction.ndim) if i != axis)
    norm: Any = np.sqrt(np.square(direction).sum(axis=others, keepdims=True))
    shape = [1] * direction.ndim
    shape[axis] = -1
    tiny = np.finfo(np.float32).tiny
    result: Array = direction * (magnitude.reshape(shape) / np.maximum(norm, tiny))
    return result
