"""How far an evaluation of the UNet is from what this machine can do at all.

    python scripts/bench_limit.py [FOLDER] [--size 512] [--seconds-per-evaluation S]

Measures the machine's peak in f32 and in 8 bits (large convolutions and matrix products through
OpenVINO, the best of several runs) and, with FOLDER, holds the multiply-adds of its UNet against
it: those planned in 8 bits at the 8-bit peak, the rest at the f32 peak. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import openvino as ov
from graph_coverage import fix_shapes, planned_layers
from openvino import opset13 as ops

from sdvino.folder.index import ModelFolder

#: How long each product is repeated; peaks are the best of the repetitions.
SECONDS = 2.0
#: Channels and side of the convolutions, side of the matrices, products in a row.
CHANNELS, SIDE, MATRIX, CHAIN = 256, 64, 1536, 4
_F32 = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one evaluation."""

    eight_bit: int
    float32: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.eight_bit + self.float32


@dataclass(frozen=True, slots=True)
class Peaks:
    """Multiply-adds a second."""

    eight_bit: float
    float32: float


@dataclass(frozen=True, slots=True)
class Limit:
    """An evaluation beside the machine's limit. Shares are 1 at the limit."""

    seconds: float
    #: What the evaluation would take with every product at its own type's peak.
    least_seconds: float
    share: float
    #: Its multiply-adds a second, whatever their type, against the 8-bit peak.
    share_of_eight_bit_peak: float


def limit_of(work: Work, peaks: Peaks, seconds: float) -> Limit:
    """Return how far an evaluation that takes ``seconds`` is from the machine's limit."""
    least = work.eight_bit / peaks.eight_bit + work.float32 / peaks.float32
    return Limit(seconds, least, least / seconds, work.total / seconds / peaks.eight_bit)


def describe(work: Work, peaks: Peaks, limit: Limit) -> str:
    """Return it for people; an operation is a multiplication or an addition."""
    return (
        f"The machine's measured peak is {2 * peaks.float32 / 1e9:,.0f} GFLOP/s in f32 and"
        f" {2 * peaks.eight_bit / 1e9:,.0f} GOP/s in 8 bits. An evaluation is"
        f" {2 * work.total / 1e9:,.1f} G operations, {work.eight_bit / work.total:.0%} of them in"
        f" 8 bits: {limit.least_seconds:.3f} s at these peaks. It takes {limit.seconds:.3f} s: the"
        f" machine's limit is {limit.share:.0%} of that, and the operations a second are"
        f" {limit.share_of_eight_bit_peak:.0%} of the 8-bit peak."
    )


def count(folder: ModelFolder, side: int) -> Work:
    """Return the multiply-adds of the folder's UNet for pictures of ``side`` x ``side`` pixels."""
    scale = folder.vae_scale_factor
    model = ov.Core().read_model(folder.components["unet"].xml)
    fix_shapes(folder, "unet", model, side // scale, side // scale)
    layers = planned_layers("unet", model)
    eight = sum(layer.multiply_adds for layer in layers if layer.planned)
    return Work(eight, sum(layer.multiply_adds for layer in layers) - eight)


def chain(kind: str, eight_bit: bool, *, size: int = 1) -> tuple[ov.Model, int]:
    """Return a model of products in a row and its multiply-adds; ``size`` divides the sides."""
    generator = np.random.default_rng(0)
    if kind == "Convolution":
        channels, side = CHANNELS // size, SIDE // size
        shape, weights = [1, channels, side, side], [channels, channels, 3, 3]
        each = side * side * channels * channels * 9
    else:
        side = MATRIX // size
        shape, weights = [1, side, side], [side, side]
        each = side**3
    x = ops.parameter(shape, np.float32, name="x")
    node: Any = x
    for _ in range(CHAIN):
        stored = generator.integers(-100, 100, weights)
        weight: Any
        if eight_bit:
            node = ops.fake_quantize(node, *map(np.float32, (-1, 1, -1, 1)), 256)
            weight = ops.convert(ops.constant(stored.astype(np.int8)), np.float32)
            scale = np.full([weights[0], *(1 for _ in weights[1:])], 1e-3, np.float32)
            weight = ops.multiply(weight, ops.constant(scale))
        else:
            weight = ops.constant(stored.astype(np.float32) * np.float32(1e-3))
        if kind == "Convolution":
            node = ops.convolution(node, weight, [1, 1], [1, 1], [1, 1], [1, 1])
        else:
            node = ops.matmul(node, weight, transpose_a=False, transpose_b=True)
    return ov.Model([ops.result(node)], [x], kind), each * CHAIN


def rate(kind: str, eight_bit: bool, *, seconds: float = SECONDS, size: int = 1) -> float:
    """Return the most multiply-adds a second that this machine does of one kind."""
    model, multiply_adds = chain(kind, eight_bit, size=size)
    return multiply_adds / best_seconds(model, seconds)


def best_seconds(model: ov.Model, seconds: float, threads: int | None = None) -> float:
    """Return the least seconds of one run of ``model``, of runs for so many ``seconds``.

    On the CPU, in f32 where it leaves floats; the model has one input. ``threads`` None: as many
    as OpenVINO takes.
    """
    own = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(model, "CPU", {**_F32, **own}).create_infer_request()
    values = np.random.default_rng(1).uniform(-1, 1, request.get_input_tensor().get_shape())
    request.set_input_tensor(ov.Tensor(values.astype(np.float32)))
    request.infer()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best == math.inf:
        started = time.perf_counter()
        request.infer()
        best = min(best, time.perf_counter() - started)
    return best


def measure_peaks(*, seconds: float = SECONDS, size: int = 1) -> Peaks:
    """Return the machine's peaks, of convolutions or matrix products, whichever are faster."""

    def peak(eight_bit: bool) -> float:
        kinds = ("Convolution", "MatMul")
        return max(rate(kind, eight_bit, seconds=seconds, size=size) for kind in kinds)

    return Peaks(eight_bit=peak(True), float32=peak(False))


def read_limit(value: Mapping[str, Any]) -> tuple[Work, Peaks, Limit]:
    """Return what the script printed as JSON."""
    return Work(**value["work"]), Peaks(**value["peaks"]), Limit(**value["limit"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print JSON; for people on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a converted folder")
    parser.add_argument("--size", type=int, default=512, help="the picture's side in pixels")
    parser.add_argument("--seconds-per-evaluation", type=float, help="as measured")
    options = parser.parse_args(arguments)
    peaks = measure_peaks()
    found: dict[str, Any] = {"peaks": asdict(peaks)}
    if options.folder is not None:
        work = count(ModelFolder.open(options.folder), options.size)
        found["work"] = asdict(work)
        if options.seconds_per_evaluation is not None:
            limit = limit_of(work, peaks, options.seconds_per_evaluation)
            found["limit"] = asdict(limit)
            print(describe(work, peaks, limit), file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
