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
from sdvino.compress.ir import read_ir
from sdvino.compress.similarity import relative_error
from sdvino.errors import SdvinoError

Sample = Mapping[str, NDArray[Any]]
#: Fewer groups than this say nothing about where the error comes from.
_FEWEST_GROUPS = 4


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
    progress: Callable[[float], None] = lambda share: None,
) -> Sensitivity:
    """Return what each compressed layer does alone to the output of ``component``.

    ``samples`` are inputs by tensor name, all of one shape. Layers are taken together by block as
    far as ``seconds`` demand. Raises SdvinoError when they allow no useful measurement, or when
    the two graphs do not belong together.
    """
    base, compressed = read_ir(float_xml), read_ir(compressed_xml)
    names = compressed_layers(compressed, operation_names(base))
    if not names:
        raise SdvinoError(f"No layer of the {component} is compressed.")
    began = time.monotonic()
    expected = run_model(base, samples)
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
        result = run_model(restored(base, compressed, others), samples)
        pairs = zip(result, expected, strict=True)
        error = math.sqrt(float(np.mean([relative_error(*pair) ** 2 for pair in pairs])))
        errors.append(LayerError(nodes, name, error))
        progress((index + 1) / len(groups))
    errors.sort(key=lambda layer: -layer.error)
    return Sensitivity(component=component, layers=tuple(errors))


def run_model(model: ov.Model, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
    """Return the first output of ``model`` for each of ``samples``, computed in f32 on the CPU."""
    # Shapes are fixed in a copy: a model that is reshaped keeps them.
    fixed = model.clone()
    ports = {name: port for port in fixed.inputs for name in port.get_names()}
    fixed.reshape({ports[name]: list(value.shape) for name, value in samples[0].items()})
    types = {name: port.get_element_type().to_dtype() for name, port in ports.items()}
    # Compressed products would else round what they read, by a rule of the plugin's own.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    run = ov.Core().compile_model(fixed, "CPU", exact)
    return [
        np.array(run({name: value.astype(types[name]) for name, value in sample.items()})[0])
        for sample in samples
    ]
