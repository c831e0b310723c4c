"""Peak memory and time of `sdvino convert`, against optimum-intel's export and NNCF, in one run.

    python scripts/bench_convert.py SOURCE [--recipes fp16,int8-weights,int8] [--output docs]

SOURCE is a diffusers folder, such as `python scripts/make_synthetic.py --arch sd15 FOLDER` makes.
Memory is that of the whole process tree, sampled ten times a second: the sum of each process's
proportional share (PSS: what several map is counted once), and what of it is the processes' own
(anonymous: the rest are pages of files, which the system drops when it needs the room). Linux only.
The table goes to stdout, and with --output to FOLDER/conversion.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_machine import about_machine, machine_line
from bench_memory import tree

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.1

# What people do without sdvino: export in half precision, then compress every component's weights.
PEER_EXPORT = """
import sys
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
main_export(sys.argv[1], output=sys.argv[2], task="text-to-image", library_name="diffusers",
            ov_config=OVConfig(dtype="fp16"))
"""
PEER_COMPRESS = """
import sys
from pathlib import Path
import nncf, openvino as ov
for xml in sorted(Path(sys.argv[1]).glob("*/openvino_model.xml")):
    model = nncf.compress_weights(ov.Core().read_model(xml),
                                  mode=nncf.CompressWeightsMode.INT8_ASYM)
    target = Path(sys.argv[2]) / xml.parent.name / xml.name
    target.parent.mkdir(parents=True)
    ov.save_model(model, target)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One command, measured."""

    name: str
    seconds: float
    #: Peaks over the process tree, in bytes.
    pss: int
    anonymous: int
    #: Bytes of the folder it made.
    output: int


def memory(process: int) -> tuple[int, int]:
    """Return PSS and anonymous bytes of a process; 0 once it is gone."""
    found = {"Pss": 0, "Anonymous": 0}
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0, 0
    return found["Pss"], found["Anonymous"]


def measure(name: str, command: Sequence[str], output: Path) -> Run:
    """Run ``command`` and return its time and the peaks of its process tree."""
    print(f"running: {name}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        peaks = [0, 0]
        while running.poll() is None:
            together = [sum(parts) for parts in zip(*map(memory, tree(running.pid)), strict=True)]
            peaks = [max(pair) for pair in zip(peaks, together, strict=True)]
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if running.returncode:
            errors.seek(0)
            last = "\n".join(errors.read().splitlines()[-5:])
            raise SystemExit(f"{name} failed with status {running.returncode}:\n{last}")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Run(name, seconds, peaks[0], peaks[1], size)


def run_all(source: Path, recipes: Sequence[str], scratch: Path, peers: bool) -> list[Run]:
    """Measure the peers and every recipe, one after the other; what they make is removed."""
    runs = []
    if peers:
        exported, compressed = scratch / "exported", scratch / "compressed"
        command = [sys.executable, "-c", PEER_EXPORT, str(source), str(exported)]
        runs.append(measure("optimum-intel export", command, exported))
        command = [sys.executable, "-c", PEER_COMPRESS, str(exported), str(compressed)]
        runs.append(measure("NNCF compress_weights", command, compressed))
        shutil.rmtree(exported)
        shutil.rmtree(compressed)
    for recipe in recipes:
        output = scratch / recipe
        command = [sys.executable, "-m", "sdvino", "convert", str(source), str(output)]
        runs.append(measure(f"sdvino {recipe}", [*command, "--recipe", recipe], output))
        shutil.rmtree(output)
    return runs


def table(runs: Sequence[Run]) -> str:
    """Return the runs as a table in Markdown."""
    lines = [
        "| | seconds | peak memory, GB | of it not pages of files, GB | made, GB |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        numbers = (run.pss / 1e9, run.anonymous / 1e9, run.output / 1e9)
        cells = " | ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"| {run.name} | {run.seconds:.0f} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a diffusers folder")
    parser.add_argument("--recipes", default="fp16,int8-weights,int8")
    parser.add_argument("--no-peers", action="store_true", help="measure sdvino alone")
    parser.add_argument("--scratch", type=Path, help="where to convert to: needs some 10 GB")
    parser.add_argument("--output", type=Path, help="folder for conversion.md and .json")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("memory is read from /proc, which this system does not have; use Linux")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as scratch:
        recipes = options.recipes.split(",")
        runs = run_all(options.source, recipes, Path(scratch), not options.no_peers)
    print(table(runs))
    if options.output is not None:
        about = about_machine()
        value = {
            "source": options.source.name,
            "machine": about,
            "runs": [asdict(run) for run in runs],
        }
        text = json.dumps(value, indent=2) + "\n"
        (options.output / "conversion.json").write_text(text, encoding="utf-8")
        facts = machine_line(about)
        command = f"python scripts/bench_convert.py {options.source.name}"
        document = (
            f"# Converting: memory and time\n\n{options.source.name}, printed by `{command}` on"
            f" {facts}.\n\n{table(runs)}\n\nMemory is that of the whole process tree: the sum of"
            " each process's proportional share. Pages of files (mapped weights) are dropped by"
            " the system when it needs the room.\n"
        )
        (options.output / "conversion.md").write_text(document, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
