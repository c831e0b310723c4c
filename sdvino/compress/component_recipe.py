"""How one component of a pipeline is stored, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from sdvino.errors import RequestError
from sdvino.inputs.patterns import compile_pattern
from sdvino.settings import check_choice

#: fp16: half-precision weights, nothing quantized. int8-weights: weights in 8 bits, arithmetic in
#: float. int4-weights: weights of linears in 4 bits where they bear it, else in 8. int8-hybrid:
#: linears and embeddings as in int8-weights, convolutions as in int8. int8: weights and activations
#: in 8 bits (W8A8). global: 8 bits, one symmetric scale for each tensor, whatever is in it. local:
#: each layer's bits, granularity and range from its own numbers, under a budget of bytes.
Treatment = Literal[
    "fp16", "int8-weights", "int8-hybrid", "int8", "int4-weights", "global", "local"
]
Granularity = Literal["tensor", "channel", "group"]

TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
#: Treatments that measure activations, and so need calibration inputs.
CALIBRATED: frozenset[Treatment] = frozenset({"int8-hybrid", "int8"})


#: Bits of a weight, the default first.
_BITS: Mapping[Treatment, tuple[int, ...]] = MappingProxyType(
    {
        "fp16": (16,),
        "int8-weights": (8,),
        "int8-hybrid": (8,),
        "int8": (8,),
        "int4-weights": (4,),
        "global": (8,),
        "local": (4, 8),
    }
)
# What NNCF and OpenVINO's plugins take: weight compression knows channels (and groups in 4 bits),
# quantization knows tensors and channels.
_GRANULARITIES: Mapping[Treatment, tuple[Granularity, ...]] = MappingProxyType(
    {
        "fp16": ("channel",),
        "int8-weights": ("channel",),
        "int8-hybrid": ("channel",),
        "int8": ("channel", "tensor"),
        "int4-weights": ("group", "channel"),
        "global": ("tensor",),
        "local": (),
    }
)
#: Of local: 4 bits for most layers, 8 and half precision for those that need them.
DEFAULT_BUDGET = 0.3
#: A budget between a share and this is a mistake: 30 for 30 %.
_FEWEST_BYTES = 1024
_GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecipe:
    """How one component is stored. Raises RequestError for choices that do not go together."""

    mode: Treatment
    #: Weights share a scale by tensor, by output channel, or (4 bits) by group within a channel.
    #: None: by channel, in global by tensor; local chooses for each layer.
    granularity: Granularity | None = None
    #: Weights in a group, for granularity group; a layer whose width it does not divide takes a
    #: smaller one, or stays in 8 bits.
    group_size: int | None = None
    #: Bits of a weight: 16 for fp16, 4 for int4-weights, else 8; local: the fewest of a layer, 4 or
    #: 8. None: what the mode says, 4 for local.
    bits: int | None = None
    #: int4-weights: the share of the linears' weights that goes to 4 bits, those first that bear it
    #: best (by the error of their weights; no data); the rest, convolutions, embeddings: 8 bits.
    ratio: float = 1.0
    #: Regular expressions, searched in the names of operations: what matches stays in float.
    float_layers: tuple[str, ...] = ()
    #: The first and the last layer stay in float.
    float_ends: bool = False
    #: Convolutions whose output is itself the residual of a block's sum stay in float (see
    #: `sdvino.compress.layers.residual_sources`).
    float_residual_sources: bool = False
    #: int8: share of the range of activations that SmoothQuant moves into the weights of linears,
    #: 0 to 1 (arXiv:2211.10438); None: off.
    smooth_quant_alpha: float | None = None
    #: int8: the products of attention in 8 bits; None: where the target is faster with it.
    quantize_attention: bool | None = None
    #: local: what the weights may take: up to 1 a share of their bytes in half precision, above 1
    #: the bytes of the whole component. None: `DEFAULT_BUDGET`.
    budget: float | None = None
    #: local: how many groups of layers have their effect on the output measured; None: every layer
    #: by itself, groups of neighbours in large models; 0: none, weights alone decide.
    measured_groups: int | None = None
    #: global, local: activations in 8 bits too. None: in global they are, in local they are not.
    activations: bool | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, TREATMENTS)
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.bits is None:
            object.__setattr__(self, "bits", _BITS[self.mode][0])
        if self.granularity is None and self.mode != "local":
            granularity = "tensor" if self.mode == "global" else "channel"
            object.__setattr__(self, "granularity", granularity)
        for problem in self._problems():
            raise RequestError(problem)

    @property
    def calibrated(self) -> bool:
        """Whether compressing needs calibration inputs."""
        if self.mode == "local":
            return self.quantizes_activations or self.measured_groups != 0
        return self.mode in CALIBRATED or self.quantizes_activations

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are in 8 bits, by the recipe's mode or its choice."""
        if self.mode in ("global", "local"):
            return self.mode == "global" if self.activations is None else self.activations
        return self.mode in CALIBRATED

    @property
    def _has_w8a8(self) -> bool:
        return self.mode == "int8" or (self.mode == "local" and self.quantizes_activations)

    def _problems(self) -> Iterable[str]:
        mode, granularities = self.mode, _GRANULARITIES[self.mode]
        if self.bits not in _BITS[mode]:
            bits = " or ".join(map(str, _BITS[mode]))
            yield f"{mode} goes with bits = {bits}, not {self.bits}."
        if mode == "local" and self.granularity is not None:
            yield "local chooses each layer's granularity: leave granularity out."
        elif mode != "local" and self.granularity not in granularities:
            yield (
                f"{mode} goes with granularity {' or '.join(granularities)},"
                f" not {self.granularity}."
            )
        if (self.group_size is not None) != (self.granularity == "group"):
            yield "group_size belongs to granularity = 'group': give both, or neither."
        if self.group_size is not None and self.group_size not in _GROUP_SIZES:
            yield f"group_size is {self.group_size}; choose one of: {listed(_GROUP_SIZES)}."
        if not 0.0 < self.ratio <= 1.0:
            yield f"ratio is {self.ratio:g}; give a share above 0 and up to 1."
        if self.ratio != 1.0 and mode != "int4-weights":
            yield f"ratio belongs to int4-weights, not {mode}."
        if self.smooth_quant_alpha is not None and not 0.0 <= self.smooth_quant_alpha <= 1.0:
            yield f"smooth_quant_alpha is {self.smooth_quant_alpha:g}; give a number from 0 to 1."
        if not self._has_w8a8 and self.smooth_quant_alpha is not None:
            yield f"smooth_quant_alpha belongs to int8, not {mode}."
        if not self._has_w8a8 and self.quantize_attention:
            yield f"quantize_attention belongs to int8, not {mode}."
        if mode != "local" and self.budget is not None:
            yield f"budget belongs to local, not {mode}."
        if mode != "local" and self.measured_groups is not None:
            yield f"measured_groups belongs to local, not {mode}."
        if mode not in ("global", "local") and self.activations is not None:
            yield f"activations belongs to global and local, not {mode}."
        if self.budget is not None and not (
            0.0 < self.budget <= 1.0 or _FEWEST_BYTES <= self.budget < math.inf
        ):
            yield (
                f"budget is {self.budget:g}; give a share of half precision's bytes, above 0 and up"
                f" to 1, or a number of bytes, {_FEWEST_BYTES} or more."
            )
        if self.measured_groups is not None and not 0 <= self.measured_groups <= 10_000:
            yield f"measured_groups is {self.measured_groups}; give a number from 0 to 10,000."
        for pattern in self.float_layers:
            if compile_pattern(pattern) is None:
                yield (
                    f"float_layers has {pattern[:80]!r}, which is no regular expression, or one"
                    " that repeats too much."
                )


def listed(values: Iterable[object]) -> str:
    """Return the values with commas between them."""
    return ", ".join(map(str, values))
