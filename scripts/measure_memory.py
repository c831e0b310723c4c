"""How much memory a picture takes, and when: the most that a fresh process held, part by part.

    python scripts/measure_memory.py -m FOLDER [--steps 2] [--cases normal low 1.5GB ...]

Every case is a fresh process that draws one picture: `normal` as `sdvino generate` does, `kept` as
a program that draws more (all models stay), `low` (--low-memory), or a limit as --max-memory takes
it. The peak is VmHWM, which counts mapped pages of files; it is set back after
every part, so that each part has a peak of its own. Compiled models are kept in a folder for these
runs alone; with --first each case starts without any. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.inputs.shown import parse_size
from sdvino.outputs import PictureEvent
from sdvino.request import Request
from sdvino.runtime.memory import linux_peak
from sdvino.runtime.timings import Timings
from sdvino.settings import DeviceSettings, RunSettings

_RESET_PEAK = "5"  # proc(5), clear_refs
_CASES = ("normal", "kept", "low")
_PROMPT = "a lighthouse on a cliff at dusk"
#: `Timings` tells these apart; what is loaded is told by what comes after it.
_PARTS = ("load", "text", "denoise", "decode")


@dataclass(slots=True)
class Phase:
    """A part of a picture: its time, the most memory meanwhile, and what was held at its end."""

    name: str
    seconds: float
    #: Of the processor, all threads together: the same whether or not others use the machine.
    processor: float
    peak: int
    rest: int


@dataclass(slots=True)
class PhaseTimings(Timings):
    """Timings that note the memory whenever a part ends; the same part again joins the last."""

    phases: list[Phase] = field(default_factory=list)
    #: Processor time of this process when the last part ended.
    noted: float = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; one of the parts that grows has just ended."""
        before = getattr(self, name, 0.0)
        object.__setattr__(self, name, value)
        if name in _PARTS and value > 0.0:
            self.note(name, value - before)

    def note(self, name: str, seconds: float) -> None:
        """Say that the part ``name`` has ended."""
        peak, rest = take_peak()
        now = time.process_time()
        processor, self.noted = now - self.noted, now
        last = self.phases[-1] if self.phases else None
        if last is None or last.name != name:
            self.phases.append(Phase(name, seconds, processor, peak, rest))
            return
        last.seconds, last.processor = last.seconds + seconds, last.processor + processor
        last.peak, last.rest = max(last.peak, peak), rest


def take_peak() -> tuple[int, int]:
    """Return this process's peak since the last call, and what it holds now, in bytes."""
    peak = _peak()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="utf-8")
    rest = _peak()
    return max(peak, rest), rest


def _peak() -> int:
    return linux_peak(Path("/proc/self/status").read_text(encoding="utf-8")) or 0


def draw(job: dict[str, Any]) -> dict[str, Any]:
    """Draw one picture in this process as ``job`` says; return its phases and its hash."""
    from sdvino import StableDiffusionPipeline

    low, limit = job["case"] == "low", job["case"] not in _CASES
    device = DeviceSettings(cache_dir=Path(job["cache"]), num_threads=job["threads"])
    most = parse_size(job["case"]) if limit else None
    settings = RunSettings(default=device, max_memory=most, low_memory=low)
    timings = PhaseTimings()
    pipe = StableDiffusionPipeline.from_pretrained(job["model"], settings=settings, profile=False)
    request = Request(
        prompts=(_PROMPT,),
        seed=7,
        num_inference_steps=job["steps"],
        guidance_scale=job["guidance_scale"],
        height=job["size"],
        width=job["size"],
    ).resolve(pipe.folder)
    once = job["case"] != "kept"
    plan = pipe.memory_plan(request, once=once)
    timings.note("start", 0.0)
    events = list(pipe.stream(request, timings=timings, once=once))
    timings.note("end", 0.0)
    (pixels,) = (event.pixels for event in events if isinstance(event, PictureEvent))
    assert pixels is not None
    return {
        "plan": asdict(plan),
        "phases": [asdict(phase) for phase in timings.phases],
        "evaluations": timings.unet_evaluations,
        "picture": pixels.astype(int).sum().item(),
    }


def run(job: dict[str, Any]) -> tuple[list[Phase], dict[str, Any]]:
    """Draw in a fresh process; return its phases and the rest of what it said."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    phases = [Phase(**phase) for phase in result.pop("phases")]
    return [
        replace(phase, name=f"load for {after.name}") if phase.name == "load" else phase
        for phase, after in zip(phases, [*phases[1:], phases[-1]], strict=True)
    ], result


def report(case: str, phases: Sequence[Phase], result: dict[str, Any], seconds: float) -> str:
    """Return a case as lines of text: every part, then the whole."""
    lines = [
        f"  {phase.name:17} {phase.seconds:7.1f} s  processor {phase.processor:7.1f} s"
        f"  peak {phase.peak / 1e9:5.2f} GB  then {phase.rest / 1e9:5.2f} GB"
        for phase in phases
    ]
    peak = max(phase.peak for phase in phases)
    processor = sum(phase.processor for phase in phases)
    lines.append(
        f"  {'together':17} {seconds:7.1f} s  processor {processor:7.1f} s"
        f"  peak {peak / 1e9:5.2f} GB"
    )
    denoise = [phase for phase in phases if phase.name == "denoise"]
    count = max(1, result["evaluations"])
    lines.append(
        f"  an evaluation {sum(phase.seconds for phase in denoise) / count:.2f} s, of the processor"
        f" {sum(phase.processor for phase in denoise) / count:.2f} s; picture {result['picture']}"
    )
    return "\n".join([f"{case}: {_plan(result['plan'])}", *lines])


def _plan(plan: dict[str, Any]) -> str:
    said = [name.replace("_", " ") for name in ("release_text", "release_models") if plan[name]]
    said += [f"tiles of {plan['tile']}"] if plan["tile"] is not None else []
    said += [f"UNet in {plan['pieces']} pieces"] if plan["pieces"] > 1 else []
    return f"{', '.join(said) or 'all is kept'}; estimated {plan['peak'] / 1e9:.2f} GB"


def main() -> int:
    """Measure every case and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("--cases", nargs="+", default=["normal", "low"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--size", type=int, default=512, help="of a side of the picture")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first", action="store_true", help="nothing was compiled before")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(draw(json.loads(options.worker))))
        return 0
    names = ("model", "steps", "guidance_scale", "size", "threads")
    asked = {name: getattr(options, name) for name in names}
    for case in options.cases:
        with tempfile.TemporaryDirectory(prefix="sdvino-memory-") as cache:
            job = {**asked, "case": case, "cache": cache}
            if not options.first:
                run({**job, "steps": 1})
            started = time.perf_counter()
            phases, result = run(job)
            print(report(case, phases, result, time.perf_counter() - started), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
