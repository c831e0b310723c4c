"""Measure the compression toolbox on the demo model, and write docs/compression.md.

    python scripts/measure_toolbox.py --record build/toolbox --student steps=FOLDER ...

Every variant (scripts/toolbox_variants.py) is converted, draws the same prompts and seeds as the
float model, and is timed beside all others. A student is a finished source, as `sdvino distill`
writes it: pruned, steps and stack are known by name. With --record a run that was stopped goes on
where it was, and --only adherence, timing, duels, real or report does one part: times want a
quiet machine. Needs the convert extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate_demo import held_out_tasks
from measure_compression import ROOT, Pictures, scratch_folder, weights_of
from toolbox_adherence import Gallery, TimeLeft, evaluations, prompts_for
from toolbox_goals import curve
from toolbox_models import Workshop
from toolbox_plots import draw_sheet, plot_adherence, plot_curve
from toolbox_real import measure_real
from toolbox_record import Findings
from toolbox_report import CURVE_PLOT, SHEET, TIME_PLOT, report
from toolbox_timing import machine, measure_duel, measure_times
from toolbox_variants import DUELS, REFERENCE, STACK, Variant, parse_students, with_students

from sdvino.errors import RequestError, SdvinoError

PARTS = ("adherence", "timing", "duels", "real", "report")
FINDINGS = "findings.json"
#: Pictures in a row of the sheet.
_SHOWN = 8


class Run:
    """One run of the script over one record."""

    def __init__(self, options: argparse.Namespace, record: Path) -> None:
        self.options = options
        self.record = record
        self.findings = Findings.load(record / FINDINGS)
        students = parse_students(options.student)
        self.variants = with_students(list(students))
        self.workshop = Workshop(record, students, say)
        wanted = options.variant
        unknown = set(wanted) - {one.name for one in self.variants}
        if unknown:
            names = ", ".join(one.name for one in self.variants)
            raise RequestError(f"There is no variant {min(unknown)!r}; choose from: {names}.")
        #: What is measured now: what was asked for, and whose source is there.
        self.chosen = [
            one
            for one in self.variants
            if (not wanted or one.name in wanted or one.name == REFERENCE)
            and not self.workshop.missing(one)
        ]

    def folder(self, variant: Variant) -> Path:
        """Return the variant's folder, and write down what it weighs."""
        folder = self.workshop.folder(variant)
        self.findings.forget_others({variant.name: weights_of(folder)})
        self.findings.facts[variant.name] = self.workshop.facts(variant)
        self._save()
        return folder

    def adherence(self) -> None:
        """Draw with every variant."""
        prompts = self.options.prompts
        counts = prompts_for(self.chosen, prompts, self.options.curve_prompts)
        gallery = Gallery(self.record, prompts, self.findings.adherence, say)
        left = TimeLeft({one.name: evaluations(one, counts[one.name]) for one in self.chosen})
        for one in self.chosen:
            found = gallery.draw(one, self.folder(one), counts[one.name])
            self.findings.adherence[one.name] = found
            self._save()
            say(f"{one.name}: {found.right}; {left.done(one.name, gallery.fresh)}")

    def timing(self) -> None:
        """Time every variant, in turn."""
        folders = {one: self.folder(one) for one in self.chosen}
        options = self.options
        self.findings.times = measure_times(folders, options.rounds, options.threads, say)
        self.findings.machine = machine(options.threads)
        self._save()

    def duels(self) -> None:
        """Time the stack beside each of those that it is asked to be faster than."""
        there = {one.name: one for one in self.chosen}
        for name in DUELS:
            if name in there and STACK in there:
                slower, faster = ((one, self.folder(one)) for one in (there[name], there[STACK]))
                say(f"{STACK} beside {name}: {self.options.duels} pictures each")
                options = self.options
                found = measure_duel(slower, faster, options.duels, options.threads)
                self.findings.duels[name] = found
                self.findings.machine = machine(self.options.threads)
                self._save()

    def real(self) -> None:
        """Run the passes at Stable Diffusion's size."""
        found = self.findings.real
        measure_real(self.options.real, self.record / "real", found, self.options, self._save, say)

    def report(self) -> None:
        """Write the page, its numbers as JSON, and its pictures."""
        out: Path = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        known = {one.student for one in self.variants if one.name in self.findings.facts}
        students = sorted(filter(None, known))
        text = report(self.findings, self.variants, command(self.options, students))
        (out / "compression.md").write_text(text, encoding="utf-8")
        self.findings.save(out / "compression.json")
        plot_adherence(self.findings, self.variants, out / TIME_PLOT)
        if curve(self.findings):
            plot_curve(self.findings, out / CURVE_PLOT)
        rows = []
        for one in self.variants:
            drawn = self.findings.adherence.get(one.name)
            if one.shown and drawn is not None:
                kept = Pictures(self.record / "pictures" / drawn.stem)
                pictures = list(kept.load(min(_SHOWN, drawn.prompts)))
                if pictures:  # somebody may have deleted them
                    rows.append((one.title, pictures))
        if rows:
            captions = [task.prompt.text for task in held_out_tasks(_SHOWN)]
            draw_sheet(rows, captions, out / SHEET)

    def _save(self) -> None:
        self.findings.save(self.record / FINDINGS)


def say(line: str) -> None:
    """Tell what is being done."""
    print(line, file=sys.stderr, flush=True)


def command(options: argparse.Namespace, students: Sequence[str]) -> str:
    """Return how the page is made again: with the names of what was given, not its places."""
    words = [f"--prompts {options.prompts}", f"--curve-prompts {options.curve_prompts}"]
    words += [f"--rounds {options.rounds} --duels {options.duels}", "--record build/toolbox"]
    words += [f"--student {name}={name.upper()}" for name in students]
    return " ".join(["python scripts/measure_toolbox.py", *words])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=2000, help="pictures of each variant")
    parser.add_argument("--curve-prompts", type=int, default=400, help="of the low-rank curve")
    parser.add_argument("--rounds", type=int, default=15, help="of the times")
    parser.add_argument("--duels", type=int, default=60, help="pictures that two draw in turn")
    parser.add_argument("--threads", type=int, help="for the times; default: sdvino's own choice")
    parser.add_argument(
        "--student", action="append", default=[], metavar="NAME=FOLDER", help="a finished source"
    )
    parser.add_argument("--variant", action="append", default=[], help="only these; repeats")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--real", type=Path, help="a source of Stable Diffusion 1.5's layout")
    parser.add_argument("--record", type=Path, help="keep what was found here and go on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="for compression.md ...")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.curve_prompts, options.rounds, options.duels) < 1:
        parser.error("--prompts, --curve-prompts, --rounds and --duels are 1 or more")
    if options.only == "real" and options.real is None:
        parser.error("--only real goes with --real SOURCE")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and write the page."""
    options = parse(arguments)
    parts = PARTS if options.only is None else (options.only, "report")
    try:
        with scratch_folder(options.record) as record:
            run = Run(options, record)
            for part in dict.fromkeys(parts):
                if part != "real" or options.real is not None:
                    getattr(run, part)()
    except KeyboardInterrupt:
        say("\ninterrupted; with --record the same command goes on from here")
        return 130
    except SdvinoError as problem:
        say(f"measure_toolbox: {problem}")
        return problem.exit_code
    print(options.out / "compression.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
