"""The passes at Stable Diffusion 1.5's size: what they take, and what the smaller UNet gains.

The source may have random weights: the layout decides time and memory. Each pass runs in a process
of its own, on the UNet; then int8 alone and int8 after the cut of docs/lean.toml are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_memory import tree_highest
from graph_coverage import fix_shapes, planned_layers
from measure_compression import ROOT
from toolbox_models import unet_bytes
from toolbox_timing import machine, random_inputs, run_settings
from toolbox_variants import LEAN, row

from sdvino.convert.api import convert
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.graph.saving import read_ir
from sdvino.runtime.components import Components, unet_shapes

Say = Callable[[str], None]

SIDE = 512
#: The one of `PASSES` whose UNet is kept and timed.
CUT = "lean"
#: What is run, each by itself.
PASSES: Mapping[str, tuple[str, str]] = {
    CUT: ("as docs/lean.toml says", ""),
    "heads": ("prune, a quarter of the heads", row("prune", method="heads", share=0.25)),
    "channels": ("prune, half the channels", row("prune", method="channels", share=0.5)),
    "blocks": ("prune, blocks of 30 %", row("prune", method="blocks", share=0.3)),
    "magnitude": ("prune, 30 % zeros", row("prune", share=0.3, scope="global")),
    "low-rank": ("low rank, 70 % of the weights", row("low_rank", budget=0.7)),
}
#: The UNet as the recipe int8 has it; what it is calibrated on means nothing with random weights.
_INT8 = """\
name = 'real-int8'
[[passes]]
kind = 'quantize'
scheme = 'int8'
component = 'unet'
[calibration]
trajectories = 1
strata = 2
samples = 4
"""
#: Both quantizations, of the UNet; neither their inputs nor their groups decide the memory.
QUANTIZATIONS: Mapping[str, tuple[str, str]] = {
    "global": (
        "quantize, one scheme, activations too",
        row("quantize", scheme="global", component="unet"),
    ),
    "local": (
        "quantize by layer, 8 groups measured",
        row("quantize", scheme="local", component="unet", measured_groups=8),
    ),
}
#: What is measured on random weights means nothing: two inputs take the least time.
_FEW = "[calibration]\ntrajectories = 1\nstrata = 1\nsamples = 2\n"
_LOOK_SECONDS = 0.2


def measure_real(
    source: Path,
    folder: Path,
    found: dict[str, Any],
    options: argparse.Namespace,
    save: Callable[[], None],
    say: Say,
) -> None:
    """Add what is not in ``found`` yet: the passes one by one, then the times.

    ``folder`` takes what the passes make; ``save`` is called after each of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found.setdefault("what", f"A source of Stable Diffusion 1.5's layout, {SIDE} x {SIDE} pixels")
    found.setdefault("side", SIDE)
    found["machine"] = machine(options.threads)
    passes = found.setdefault("passes", {})
    for run, rows_of in ((_run_pass, PASSES), (_run_quantization, QUANTIZATIONS)):
        for name, (what, rows) in rows_of.items():
            if name in passes:
                continue
            say(f"real: {what}")
            passes[name] = {"what": what, **run(source, folder, name, rows)}
            save()
            say(f"real: {what}: {passes[name]['seconds']:.0f} s")
    if "times" not in found:
        lean = folder / CUT
        if not lean.is_dir():
            raise SdvinoError(f"{lean} is gone; delete the findings of `real`, and run it again.")
        models = {"int8": ("int8 alone", source), "lean-int8": ("int8 after the cut", lean)}
        found["times"] = _times(models, folder, options, say)
        save()


def _run_pass(source: Path, folder: Path, name: str, rows: str) -> dict[str, Any]:
    """Run the passes of one recipe in a process; return what they took and left."""
    recipe, out = folder / f"{name}.toml", folder / name
    text = f"name = '{name}'\n{rows}" if rows else LEAN.read_text(encoding="utf-8")
    recipe.write_text(f"{text}\n{_FEW}", encoding="utf-8")
    script = Path(__file__).with_name("apply_passes.py")
    command = [sys.executable, str(script), str(source), str(out), "--recipe", str(recipe)]
    command += ["--json", str(folder / f"{name}.json")]
    taken = _watch(command, out, folder / f"{name}.log")
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if name != CUT:  # what it made is not needed any more, and takes gigabytes
        shutil.rmtree(out)
    first, last_entry = told["passes"][0]["before"], told["passes"][-1]["after"]
    return {
        **taken,
        "steps": told["cpu_seconds"],
        "operations_left": last_entry["operations"] / first["operations"],
        "parameters_left": last_entry["parameters"] / first["parameters"],
        "nonzero_left": last_entry["nonzero"] / first["nonzero"],
    }


def _run_quantization(source: Path, folder: Path, name: str, rows: str) -> dict[str, Any]:
    """Convert with the UNet quantized; return what it took, and the share of bytes left."""
    recipe, out = folder / f"{name}.toml", folder / name
    recipe.write_text(f"name = 'real-{name}'\n{rows}{_FEW}", encoding="utf-8")
    command = [sys.executable, "-m", "sdvino", "convert", str(source), str(out), "--no-gate"]
    taken = _watch([*command, "--recipe", str(recipe)], out, folder / f"{name}.log")
    half = sum(file.stat().st_size for file in (source / "unet").glob("*.safetensors"))
    left = unet_bytes(out) / half
    shutil.rmtree(out)
    return {**taken, "bytes_left": left}


def _watch(command: list[str], out: Path, log: Path) -> dict[str, Any]:
    """Run a command that writes ``out``; return its seconds and its highest memory, in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, began = os.times(), time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, tree_highest(process.pid))
                time.sleep(_LOOK_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise SdvinoError(f"What makes {out.name} failed: {' '.join(last)}")
    after = os.times()
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": after.children_user
        + after.children_system
        - before.children_user
        - before.children_system,
        "peak_bytes": peak,
    }


def _times(
    models: Mapping[str, tuple[str, Path]], folder: Path, options: argparse.Namespace, say: Say
) -> dict[str, Any]:
    """Return the times of the UNets of some sources, quantized, in turn."""
    recipe = folder / "int8.toml"
    recipe.write_text(_INT8, encoding="utf-8")
    settings = run_settings(options.threads)
    found: dict[str, Any] = {}
    units, inputs = {}, {}
    for name, (what, source) in models.items():
        made = folder / f"{name}-converted"
        if not (made / "sdvino.json").is_file():
            say(f"real: converting for {what}")
            convert(source, made, recipe=recipe, gate=None, suggested={"guidance_scale": 1.0})
        opened = ModelFolder.open(made)
        size = (SIDE // opened.vae_scale_factor,) * 2
        model = read_ir(opened.components["unet"].xml)
        fix_shapes(opened, "unet", model, *size)
        found[name] = {
            "what": what,
            "operations": sum(layer.multiply_adds for layer in planned_layers("unet", model)),
            "bytes": unet_bytes(made),
            "seconds": [],
        }
        del model
        units[name] = Components(opened, settings).unet(*size)
        inputs[name] = random_inputs(unet_shapes(opened, *size))
        units[name].infer(inputs[name])
    for done in range(options.rounds):
        for name in units if done % 2 else reversed(units):
            began = time.perf_counter()
            units[name].infer(inputs[name])
            found[name]["seconds"].append(time.perf_counter() - began)
        say(f"real: times, round {done + 1} of {options.rounds}")
    return found
