"""How fast this processor runs a linear layer: in f32, in 8 bits, and in 8 bits as a convolution.

    python scripts/bench_linears.py [--seconds 2] [--threads N]

The layers are those of Stable Diffusion 1.5's UNet at 512 x 512: tokens, channels in and out.
Prints a table of their operations a second, the best of several runs, through OpenVINO; the third
column is what `sdvino.graph.linears` makes of the second. Where it is not faster, `sdvino tune`
says so and keeps the products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import openvino as ov
from bench_limit import best_seconds
from openvino import opset13 as ops

from sdvino.graph.linears import linears_to_convolutions

#: Tokens, channels in, channels out.
LAYERS = (
    (4096, 320, 320),
    (4096, 320, 1280),
    (4096, 1280, 320),
    (1024, 640, 640),
    (1024, 640, 2560),
    (1024, 2560, 640),
    (256, 1280, 1280),
    (256, 1280, 5120),
    (256, 5120, 1280),
)
WAYS = ("f32", "8 bits", "8 bits, as a convolution")


def layer(tokens: int, inputs: int, outputs: int, *, eight_bit: bool) -> ov.Model:
    """Return one linear layer with its bias, of random weights."""
    generator = np.random.default_rng(0)
    x = ops.parameter([1, tokens, inputs], np.float32, name="x")
    source: Any = x
    weights: Any
    if eight_bit:
        source = ops.fake_quantize(x, *map(np.float32, (-1, 1, -1, 1)), 256)
        numbers = generator.integers(-63, 64, (outputs, inputs)).astype(np.int8)
        scales = np.full((outputs, 1), 1e-3, np.float32)
        weights = ops.multiply(ops.convert(ops.constant(numbers), "f32"), ops.constant(scales))
    else:
        weights = ops.constant(generator.standard_normal((outputs, inputs)).astype(np.float32))
    bias = ops.constant(generator.standard_normal((1, 1, outputs)).astype(np.float32))
    result = ops.add(ops.matmul(source, weights, False, True), bias)
    return ov.Model([ops.result(result)], [x], "linear")


def measure(
    shape: tuple[int, int, int], seconds: float = 1.0, threads: int | None = None
) -> tuple[float, float, float]:
    """Return the operations a second of one layer in each of `WAYS`."""
    models = [layer(*shape, eight_bit=eight_bit) for eight_bit in (False, True, True)]
    if linears_to_convolutions(models[2]) != 1:
        raise AssertionError("the layer was not rewritten")
    operations = 2 * float(np.prod(shape))
    plain, eight, convolved = (operations / best_seconds(m, seconds, threads) for m in models)
    return plain, eight, convolved


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every layer and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    parser.add_argument("--threads", type=int, help="default: OpenVINO's own choice")
    options = parser.parse_args(arguments)
    print(f"| tokens, channels in and out | {' | '.join(f'{way}, GOP/s' for way in WAYS)} |")
    print("|---|---|---|---|")
    for shape in LAYERS:
        rates = measure(shape, options.seconds, options.threads)
        cells = " | ".join(f"{rate / 1e9:.0f}" for rate in rates)
        print(f"| {', '.join(map(str, shape))} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
