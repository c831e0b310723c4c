"""The frequencies of the time embedding, kept exact in an IR whose floats are saved in 16 bits.

The UNet takes the sine and cosine of timestep x frequency. Saved as float16, a frequency near 1 is
off by up to 2^-12, which at timestep 999 is a quarter of a radian: the embedding of another
timestep. OpenVINO compresses every float constant, so the table is written in fixed point.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

# 2^-24 is float32's own precision at 1; as two factors, each is exact in float16 too.
_BITS = 24
_FACTOR = np.float32(2.0 ** (-_BITS / 2))
# float16 frequencies are this close to the exact ones; anything farther is another table.
_TOLERANCE = 2.0**-10


def sinusoid_frequencies(num_channels: int, downscale_freq_shift: float) -> NDArray[np.float64]:
    """Return the frequencies of diffusers' ``get_timestep_embedding``, float64 [num_channels / 2].

    Source: arXiv:1706.03762, section 3.5, as diffusers' `Timesteps` has it.
    """
    half = num_channels // 2
    exponent = np.arange(half, dtype=np.float64) / (half - downscale_freq_shift)
    return np.asarray(np.exp(-np.log(10_000.0) * exponent))


def restore_frequencies(model: ov.Model, frequencies: NDArray[np.float64]) -> int:
    """Put exact ``frequencies`` in place of each rounded copy in ``model``; return how many.

    A copy is a constant that is multiplied to make the argument of a sine and agrees with
    ``frequencies`` to float16's precision.
    """
    products = {
        node.input_value(0).get_node().get_friendly_name(): node.input_value(0).get_node()
        for node in model.get_ops()
        if node.get_type_name() == "Sin"
    }
    replaced = 0
    for product in products.values():
        if product.get_type_name() != "Multiply":
            continue
        for port in product.inputs():
            table = _constant(port.get_source_output())
            if table is not None and _agrees(table, frequencies):
                port.replace_source_output(_fixed_point(frequencies.reshape(table.shape)))
                replaced += 1
    model.validate_nodes_and_infer_types()
    return replaced


def _constant(value: ov.Output) -> NDArray[np.float64] | None:
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.data, dtype=np.float64)


def _agrees(table: NDArray[np.float64], frequencies: NDArray[np.float64]) -> bool:
    return table.size == frequencies.size and bool(
        np.abs(table.ravel() - frequencies).max() < _TOLERANCE
    )


def _fixed_point(frequencies: NDArray[np.float64]) -> ov.Output:
    whole = np.round(frequencies * 2.0**_BITS).astype(np.int32)
    scaled = ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(_FACTOR))
    result: ov.Output = ops.multiply(scaled, ops.constant(_FACTOR)).output(0)
    return result
