"""Which layers cost a component its accuracy: each is compressed alone and the output compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.float_layers import compressed_layers, group_layers, operation_names, restored
from sdvino.compress.stepwise import Graph
from sdvino.errors import SdvinoError
from sdvino.graph.cut import cut_by_weight, split
from sdvino.graph.saving import read_ir
from sdvino.graph.upsampling import split_like
from sdvino.graph.walk import freeze_shapes
from sdvino.runtime.memory_plan import LOW_MEMORY_PIECES
from sdvino.runtime.network import Network, Pool
from sdvino.weights.numbers import mean_relative_error

Sample = Mapping[str, NDArray[Any]]
#: Fewer groups than this say nothing about where the error comes from.
_FEWEST_GROUPS = 4
#: Bytes held for a byte of float16 weights, as float32 before packing and packed (docs/memory.md).
_COPIES = 4
#: Compressed products would else round what they read, by a rule of the plugin's own.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_OUTPUT = "compared"


@dataclass(frozen=True, slots=True)
class LayerError:
    """What compressing one layer, or the layers of one block, does to the component's output."""

    #: The operations, as the IR names them.
    nodes: tuple[str, ...]
    #: The layer, or the block that the layers are in.
    name: str
    #: Relative error of the component's output when these alone are compressed.
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The layers of one component, the most sensitive first."""

    component: str
    layers: tuple[LayerError, ...]

    def most_sensitive(self, goal: float) -> int:
        """Return how many of the first layers to put back to reach the share ``goal`` of the error.

        Errors of layers are taken as independent: their squares add up.
        """
        squares = np.array([layer.error**2 for layer in self.layers])
        total = float(squares.sum())
        if total <= 0.0 or not math.isfinite(total):
            return 1
        left = np.sqrt(np.clip(1.0 - np.cumsum(squares) / total, 0.0, None))
        return int(min(len(squares), 1 + np.count_nonzero(left > goal)))


def measure_sensitivity(
    component: str,
    float_xml: Path,
    compressed_xml: Path,
    samples: Sequence[Sample],
    *,
    seconds: float,
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Sensitivity:
    """Return what each compressed layer does alone to the output of ``component``.

    ``samples`` are inputs by tensor name, all of one shape. Layers are taken together by block as
    far as ``seconds`` demand. A model that would take more than ``max_memory`` bytes is run in
    pieces. Raises SdvinoError when they allow no useful measurement, or when the two graphs do not
    belong together.
    """
    base, compressed = read_ir(float_xml), read_ir(compressed_xml)
    split_like(base, compressed)
    names = compressed_layers(compressed, operation_names(base))
    if not names:
        raise SdvinoError(f"No layer of the {component} is compressed.")
    taken = _COPIES * float_xml.with_suffix(".bin").stat().st_size
    pieces = 1 if max_memory is None or taken <= max_memory else LOW_MEMORY_PIECES
    began = time.monotonic()
    expected = run_model(base, samples, pieces)
    one = time.monotonic() - began
    most = math.floor(seconds / (1.2 * one))
    if most < min(_FEWEST_GROUPS, len(names)):
        raise SdvinoError(
            f"There is no time to measure the layers of the {component}: each takes {one:.0f} s."
        )
    groups = group_layers(names, most)
    errors = []
    for index, (name, nodes) in enumerate(groups.items()):
        if time.monotonic() - began > 1.5 * seconds:
            break
        others = [other for other in names if other not in nodes]
        result = run_model(restored(base, compressed, others), samples, pieces)
        errors.append(LayerError(nodes, name, mean_relative_error(result, expected)))
        progress((index + 1) / len(groups))
    errors.sort(key=lambda layer: -layer.error)
    return Sensitivity(component=component, layers=tuple(errors))


def run_model(
    model: ov.Model, samples: Sequence[Sample], pieces: int = 1
) -> list[NDArray[np.float32]]:
    """Return the first output of ``model`` for each of ``samples``, computed in f32 on the CPU.

    With ``pieces`` above 1 it is cut into about as many, one of which is compiled at a time.
    """
    # Shapes are fixed in a copy: a model that is reshaped keeps them.
    fixed = model.clone()
    ports = {name: port for port in fixed.inputs for name in port.get_names()}
    fixed.reshape({ports[name]: list(value.shape) for name, value in samples[0].items()})
    types = {name: port.get_element_type().to_dtype() for name, port in ports.items()}
    fixed.outputs[0].get_tensor().add_names({_OUTPUT})
    stages = [fixed]
    if pieces > 1:
        freeze_shapes(fixed)
        stages = [piece for piece, _ in split(fixed, lambda whole: cut_by_weight(whole, pieces))]
    pools: list[Pool] = [
        {name: value.astype(types[name]) for name, value in sample.items()} for sample in samples
    ]
    Network([Graph(stage, _EXACT) for stage in stages], in_turn=True).run(pools)
    return [pool[_OUTPUT] for pool in pools]
