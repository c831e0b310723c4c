"""An evaluation of the UNet as sdvino writes it, against the one that optimum-intel traces.

    python scripts/bench_networks.py SOURCE [--evaluations 6]

SOURCE is a diffusers folder, such as `python scripts/make_synthetic.py --arch sd15 FOLDER` makes.
Both graphs are exported, rewritten as the runtime does at the model's own size, and evaluated by
turns in this one process, in the CPU's default precision. Needs the `train` extra.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from bench_machine import about_machine, machine_line

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.convert.export import EXPORTERS, IR_NAME, export_component
from sdvino.convert.source import DiffusersFolder
from sdvino.graph.geglu import split_projections
from sdvino.graph.walk import freeze_shapes, reshape_static


def compile_unet(xml: Path, shapes: dict[str, list[int]]) -> ov.CompiledModel:
    """Return the UNet of ``xml`` with fixed ``shapes``, as the runtime rewrites it."""
    core = ov.Core()
    model = core.read_model(xml)
    reshape_static(model, shapes)
    freeze_shapes(model)
    split_projections(model)
    return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--evaluations", type=int, default=6, help="of each graph")
    options = parser.parse_args(arguments)
    source = DiffusersFolder.open(options.source)
    channels, height, width = source.latent_shape
    config = source.configs["unet"]
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        "sample": rng.standard_normal((1, channels, height, width)).astype(np.float32),
        "timestep": np.array([500], np.int64),
        "encoder_hidden_states": rng.standard_normal((1, 77, config["cross_attention_dim"])).astype(
            np.float32
        ),
    }
    shapes = {name: list(value.shape) for name, value in inputs.items()}
    print(machine_line(about_machine()))
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        compiled, exported = {}, {}
        for exporter in EXPORTERS:
            began = time.perf_counter()
            export_component(source, "unet", Path(folder) / exporter, exporter)
            exported[exporter] = time.perf_counter() - began
            compiled[exporter] = compile_unet(Path(folder) / exporter / IR_NAME, shapes)
            compiled[exporter](inputs)
        seconds: dict[str, list[float]] = {exporter: [] for exporter in EXPORTERS}
        for _ in range(options.evaluations):
            for exporter in EXPORTERS:
                began = time.perf_counter()
                compiled[exporter](inputs)
                seconds[exporter].append(time.perf_counter() - began)
    medians = {exporter: statistics.median(times) for exporter, times in seconds.items()}
    print("| UNet by | exported in, s | an evaluation, s | ratio |")
    print("|---|---|---|---|")
    for exporter in EXPORTERS:
        ratio = medians[exporter] / medians["optimum-intel"]
        print(f"| {exporter} | {exported[exporter]:.1f} | {medians[exporter]:.3f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
