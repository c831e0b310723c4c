"""Where the time of one evaluation goes: python scripts/profile_model.py FOLDER [--component unet]

Compiles a component of a converted folder for the CPU as sdvino does, with OpenVINO's profiling
counters on, evaluates it on noise and prints the time by kind of operation and by the kernel that
did it, the most expensive first. `--size` is the picture's side, `--layers N` adds single layers.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import openvino as ov
from graph_coverage import fix_shapes

from sdvino.errors import RequestError, SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.graph.prepare import prepare_unet
from sdvino.runtime.compiling import rewrite_for
from sdvino.runtime.components import unet_shapes
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.properties import compile_properties, precision_in
from sdvino.settings import DeviceSettings, LinearKernel, Precision

#: Counters of these states say nothing.
_IDLE = ("Status.NOT_RUN", "Status.OPTIMIZED_OUT")


@dataclass(frozen=True, slots=True)
class Counter:
    """What one node of the compiled model took, in milliseconds an evaluation."""

    name: str
    kind: str
    kernel: str
    milliseconds: float


def prepared(
    folder: ModelFolder, component: str, side: int, settings: DeviceSettings
) -> tuple[ov.Model, dict[str, Any]]:
    """Return ``component`` at the shapes, and with the rewrites, that sdvino gives it.

    And the properties that it is compiled with.
    """
    if component not in folder.components:
        raise RequestError(
            f"{folder.path} has no {component}; it has {', '.join(folder.components)}."
        )
    model = ov.Core().read_model(folder.components[component].xml)
    latents = side // folder.vae_scale_factor
    if component == "unet":
        prepare_unet(model, shapes=unet_shapes(folder, latents, latents))
    else:
        fix_shapes(folder, component, model, latents, latents)
    facts = {"CPU": device_facts(shared_core(), "CPU")}
    eight_bits = folder.components[component].ir.quantized
    properties = compile_properties(settings, "CPU", facts, component, eight_bits=eight_bits)
    rewrite_for(component, settings, precision_in(properties), facts)(model)
    return model, properties


def profile(model: ov.Model, properties: Mapping[str, Any], evaluations: int) -> list[Counter]:
    """Return what each node took in the mean of ``evaluations``, after one that is not counted."""
    compiled = ov.Core().compile_model(model, "CPU", {**properties, "PERF_COUNT": True})
    request = compiled.create_infer_request()
    rng = np.random.default_rng(0)
    for number, port in enumerate(compiled.inputs):
        dtype = port.get_element_type().to_dtype()
        noise = rng.standard_normal(tuple(port.shape)) if np.issubdtype(dtype, np.floating) else 1
        request.set_input_tensor(number, ov.Tensor(np.full(tuple(port.shape), noise, dtype)))
    spent: dict[tuple[str, str, str], float] = defaultdict(float)
    request.infer()
    for _ in range(evaluations):
        request.infer()
        for entry in request.get_profiling_info():
            if str(entry.status) not in _IDLE:
                key = (entry.node_name, entry.node_type, entry.exec_type)
                spent[key] += entry.real_time.total_seconds() * 1000 / evaluations
    return [Counter(*key, milliseconds) for key, milliseconds in spent.items()]


def by_kind(counters: Iterable[Counter]) -> list[tuple[str, str, int, float]]:
    """Return kind, kernel, number of nodes and milliseconds, the most expensive first."""
    grouped: dict[tuple[str, str], list[float]] = defaultdict(list)
    for counter in counters:
        grouped[counter.kind, counter.kernel].append(counter.milliseconds)
    rows = [(*key, len(times), sum(times)) for key, times in grouped.items()]
    return sorted(rows, key=lambda row: -row[3])


def table(counters: Sequence[Counter], most: int = 14) -> str:
    """Return a Markdown table of the kinds of operations."""
    rows = by_kind(counters)
    total = sum(row[3] for row in rows)
    lines = ["| operation | kernel | nodes | ms | share |", "|---|---|---|---|---|"]
    for kind, kernel, count, spent in rows[:most]:
        lines.append(f"| {kind} | {kernel} | {count} | {spent:.0f} | {spent / total:.0%} |")
    rest = rows[most:]
    if rest:
        count, spent = sum(row[2] for row in rest), sum(row[3] for row in rest)
        lines.append(f"| the rest | | {count} | {spent:.0f} | {spent / total:.0%} |")
    lines.append(f"| all | | {sum(row[2] for row in rows)} | {total:.0f} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the profile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--component", default="unet")
    parser.add_argument("--size", type=int, help="the picture's side; default: the model's own")
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--linear-kernel", choices=get_args(LinearKernel), help="default: sdvino's")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: sdvino's")
    parser.add_argument("--layers", type=int, default=0, help="so many of the slowest layers too")
    options: Any = parser.parse_args(arguments)
    try:
        folder = ModelFolder.open(options.folder)
        side = folder.height if options.size is None else options.size
        settings = DeviceSettings(linear_kernel=options.linear_kernel, precision=options.precision)
        model, properties = prepared(folder, options.component, side, settings)
        counters = profile(model, properties, max(1, options.evaluations))
    except SdvinoError as error:
        print(f"profile_model: {error}", file=sys.stderr)
        return error.exit_code
    print(table(counters))
    for counter in sorted(counters, key=lambda one: -one.milliseconds)[: options.layers]:
        print(f"{counter.milliseconds:8.1f} ms  {counter.kernel:28} {counter.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
