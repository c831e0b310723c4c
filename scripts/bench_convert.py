"""Peak memory and time of `sdvino convert`, against optimum-intel's export and NNCF, in one run.

    python scripts/bench_convert.py SOURCE [--recipes fp16,int8-weights,int8] [--output docs]
        [--few-samples] [--picture [--sdcpp PYTHON]]

SOURCE is a diffusers folder or, with --no-peers, a checkpoint file, such as `python
scripts/make_synthetic.py --arch sd15 FOLDER --file FILE` makes. --picture measures the
way from SOURCE to a first picture (`sdvino generate -m`, 4 steps, 512 x 512, nothing in the cache),
and with --sdcpp the same by stable-diffusion.cpp (q8_0) in the Python given, where
stable-diffusion-cpp-python is installed; conversions alone are then left out.
Memory is the resident set of the whole process tree, looked at ten times a second: for each
process that lives, the kernel's own record of its highest (VmHWM), so that no peak falls between
two looks; the sum can only be too high. It counts everything: the processes' own (anonymous)
memory, and the pages of files that they have mapped (weights, libraries), once for each process,
though the system drops those when it needs the room. What is the processes' own is told apart.
The gate is off, for its minutes say nothing about the steps, unless --gate-minutes puts it on:
with random weights it compares components alone. --few-samples calibrates int8 on two inputs of the
UNet: the peak is the same, the time is not. Linux only.
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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench_machine import about_machine, machine_line
from bench_memory import tree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.compress.recipe_file import to_toml
from sdvino.compress.recipes import CalibrationRecipe, get_recipe
from sdvino.convert.api import look_ahead, make_request

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.1

_ABOUT = (
    "Random weights in the real architectures (`python scripts/make_synthetic.py --arch NAME"
    " FOLDER`): neither time nor memory depends on what the weights are. Memory is the resident set"
    " of the whole process tree, each process at its highest; what a process shares with one it"
    " forked counts in both. Pages of files (mapped weights, libraries) are in it, and the system"
    " drops them when it needs the room. The quality gate is off where no `--gate-minutes` are"
    " given; with random weights it compares components alone."
)
#: What --few-samples calibrates on: one prompt, two timesteps with guidance.
FEW = CalibrationRecipe(trajectories=1, strata=1, samples=2)

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
#: From a checkpoint file to a picture by stable-diffusion.cpp.
PEER_PICTURE = """
import sys
from stable_diffusion_cpp import StableDiffusion
pipe = StableDiffusion(model_path=sys.argv[1], wtype="q8_0")
size = {"width": 512, "height": 512}
made = pipe.generate_image(prompt=sys.argv[3], sample_steps=4, cfg_scale=1.0, **size)
made[0].save(sys.argv[2])
"""
PROMPT = "a lighthouse at dusk"


@dataclass(frozen=True, slots=True)
class Run:
    """One command, measured. Memory in bytes."""

    name: str
    seconds: float
    #: Peak over the process tree, pages of files included.
    resident: int
    #: Peak of what is the processes' own.
    anonymous: int
    #: Bytes of the folder it made.
    output: int
    #: Steps of a worker process of sdvino's -> that process's peak.
    steps: dict[str, int]
    #: The same -> what `sdvino convert --dry-run` says.
    expected: dict[str, int] = field(default_factory=dict)


def memory(process: int) -> tuple[int, int]:
    """Return the highest resident set so far and the anonymous memory now; 0 once it is gone."""
    found = {"VmHWM": 0, "RssAnon": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0, 0
    return found["VmHWM"], found["RssAnon"]


def steps_of(process: int) -> str:
    """Return the steps that a process does, when it is a worker of a conversion; or nothing."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    if "sdvino.convert.worker" not in words:
        return "gate" if "--gate-minutes" in words else ""
    return ", ".join(word for word in words[words.index("sdvino.convert.worker") + 2 :] if word)


def expectations(source: Path, recipe: str, output: Path, steps: Iterable[str]) -> dict[str, int]:
    """Return what sdvino says beforehand that the processes of ``steps`` take, in bytes."""
    outlook = look_ahead(make_request(source, recipe=recipe), output)
    known = {needs.step.name: needs.memory for needs in outlook.steps}
    # The gate may take what making the model took.
    known["gate"] = max(known.values())
    return {names: max(known[name] for name in names.split(", ")) for names in steps}


def measure(name: str, command: Sequence[str], output: Path, cache: Path | None = None) -> Run:
    """Run ``command`` and return its time and the peaks of its process tree.

    ``cache`` is for what sdvino keeps; None: where it always is.
    """
    print(f"running: {name}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if cache is not None:
        environment["SDVINO_CACHE_DIR"] = str(cache)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        resident = anonymous = 0
        steps: dict[str, int] = {}
        while running.poll() is None:
            found = {process: memory(process) for process in tree(running.pid)}
            resident = max(resident, sum(highest for highest, _ in found.values()))
            anonymous = max(anonymous, sum(own for _, own in found.values()))
            for process, (highest, _) in found.items():
                if step := steps_of(process):
                    steps[step] = max(steps.get(step, 0), highest)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if running.returncode:
            errors.seek(0)
            last = "\n".join(errors.read().splitlines()[-5:])
            raise SystemExit(f"{name} failed with status {running.returncode}:\n{last}")
    made = output.rglob("*") if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in made if file.is_file())
    return Run(name, seconds, resident, anonymous, size, steps)


def run_all(
    source: Path,
    recipes: Sequence[str],
    scratch: Path,
    *,
    peers: bool,
    few: bool,
    gate_minutes: int | None,
) -> list[Run]:
    """Measure the peers and every recipe, one after the other; what they make is removed."""
    gate = ["--no-gate"] if gate_minutes is None else ["--gate-minutes", str(gate_minutes)]
    runs = []
    if peers:
        exported, compressed = scratch / "exported", scratch / "compressed"
        command = [sys.executable, "-c", PEER_EXPORT, str(source), str(exported)]
        runs.append(measure("optimum-intel export", command, exported))
        command = [sys.executable, "-c", PEER_COMPRESS, str(exported), str(compressed)]
        runs.append(measure("NNCF compress_weights", command, compressed))
        shutil.rmtree(exported)
        shutil.rmtree(compressed)
    for name in recipes:
        recipe, output = get_recipe(name), scratch / "converted"
        told, note = name, ""
        if few and any(entry.calibrated for entry in recipe.components.values()):
            file = scratch / "recipe.toml"
            file.write_text(to_toml(replace(recipe, calibration=FEW)), encoding="utf-8")
            told, note = str(file), f", {FEW.samples} samples"
        command = [sys.executable, "-m", "sdvino", "convert", str(source), str(output)]
        command += ["--recipe", told, *gate]
        run = measure(f"sdvino {name}{note}", command, output)
        shutil.rmtree(output)
        runs.append(replace(run, expected=expectations(source, told, output, run.steps)))
    return runs


def first_pictures(
    source: Path, recipes: Sequence[str], scratch: Path, sdcpp: Path | None
) -> list[Run]:
    """Measure the way from ``source`` to a picture, by each recipe, and by stable-diffusion.cpp."""
    runs = []
    if sdcpp is not None:
        picture = scratch / "peer.png"
        command = [str(sdcpp), "-c", PEER_PICTURE, str(source), str(picture), PROMPT]
        runs.append(measure("stable-diffusion.cpp q8_0, first picture", command, picture))
    for recipe in recipes:
        cache, picture = scratch / "cache", scratch / f"{recipe}.png"
        command = [sys.executable, "-m", "sdvino", "generate", PROMPT, "-m", str(source)]
        command += ["--recipe", recipe, "--steps", "4", "--guidance-scale", "1"]
        command += ["-W", "512", "-H", "512", "-o", str(picture)]
        runs.append(measure(f"sdvino {recipe}, first picture", command, picture, cache))
        shutil.rmtree(cache)
    return runs


def table(runs: Sequence[Run]) -> str:
    """Return the runs as a table in Markdown, and the steps of sdvino's as another."""
    lines = [
        "| | seconds | peak memory, GB | of it not pages of files, GB | made, GB |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        numbers = (run.resident / 1e9, run.anonymous / 1e9, run.output / 1e9)
        cells = " | ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"| {run.name} | {run.seconds:.0f} | {cells} |")
    steps = [(run, step) for run in runs for step in run.steps]
    if steps:
        lines += ["", "| | steps of one process | its peak memory, GB | foreseen |"]
        lines.append("|---|---|---|---|")
    for run, step in steps:
        foreseen = f"{run.expected[step] / 1e9:.2f}" if step in run.expected else ""
        lines.append(f"| {run.name} | {step} | {run.steps[step] / 1e9:.2f} | {foreseen} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Section:
    """What one command measured."""

    source: str
    command: str
    machine: dict[str, str]
    runs: list[Run]


def write_documents(folder: Path, section: Section) -> None:
    """Write conversion.md and conversion.json; what other commands left in the latter stays."""
    file = folder / "conversion.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    found = {entry["command"]: entry for entry in [*kept, asdict(section)]}
    file.write_text(json.dumps(list(found.values()), indent=2) + "\n", encoding="utf-8")
    parts = ["# Converting: memory and time", "", _ABOUT, ""]
    for entry in found.values():
        runs = [Run(**run) for run in entry["runs"]]
        facts = machine_line(entry["machine"])
        parts += [f"## {entry['source']}", "", f"`{entry['command']}`, on {facts}.", ""]
        parts += [table(runs), ""]
    (folder / "conversion.md").write_text("\n".join(parts), encoding="utf-8")


def _words(options: argparse.Namespace) -> str:
    words = [f"--recipes {options.recipes}"]
    words += ["--no-peers"] if options.no_peers else []
    words += ["--few-samples"] if options.few_samples else []
    words += ["--picture"] if options.picture else []
    words += ["--sdcpp PYTHON"] if options.sdcpp is not None else []
    minutes = options.gate_minutes
    words += [] if minutes is None else [f"--gate-minutes {minutes}"]
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a diffusers folder, or a checkpoint file")
    parser.add_argument("--recipes", default="fp16,int8-weights,int8")
    parser.add_argument("--no-peers", action="store_true", help="measure sdvino alone")
    parser.add_argument("--few-samples", action="store_true", help="calibrate int8 on two inputs")
    parser.add_argument("--picture", action="store_true", help="measure first pictures instead")
    parser.add_argument("--sdcpp", type=Path, help="a Python with stable-diffusion-cpp-python")
    parser.add_argument("--gate-minutes", type=int, help="put the gate on, for so many minutes")
    parser.add_argument("--scratch", type=Path, help="where to convert to: needs some 10 GB")
    parser.add_argument("--output", type=Path, help="folder for conversion.md and .json")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which this system does not have; use Linux")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as scratch:
        recipes = options.recipes.split(",")
        if options.picture:
            runs = first_pictures(options.source, recipes, Path(scratch), options.sdcpp)
        else:
            runs = run_all(
                options.source,
                recipes,
                Path(scratch),
                peers=not options.no_peers,
                few=options.few_samples,
                gate_minutes=options.gate_minutes,
            )
    print(table(runs))
    if options.output is not None:
        command = f"python scripts/bench_convert.py {options.source.name} {_words(options)}"
        section = Section(options.source.name, command.rstrip(), about_machine(), runs)
        write_documents(options.output, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
