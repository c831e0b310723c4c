"""sdvino beside optimum-intel, OpenVINO GenAI and diffusers, on the same work.

    python scripts/bench_peers.py --work FOLDER                       every case, three runs
    python scripts/bench_peers.py --work FOLDER --isa avx2-vnni       as a laptop would have it
    python scripts/bench_peers.py --work FOLDER --quick               one case, one run
    python scripts/bench_peers.py --work FOLDER --prepare             only make the models

FOLDER takes the models (some 10 GB for Stable Diffusion 1.5 and 25 GB for XL, reckoned, not
measured), made once and reused, and a journal of what was measured: when this is stopped, the same
command goes on. --output docs writes performance.md, .json and .png there; without it the tables
go to stdout alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, get_args

from bench_cases import (
    CASES,
    DEFAULT_CASES,
    QUICK_CASE,
    Case,
    ChoiceError,
    Contender,
    choose_cases,
    choose_contenders,
    formats_of,
    make_job,
    missing_options,
    runs_of,
)
from bench_limit import Peaks, count, describe, limit_of
from bench_machine import ISAS, ROOT, Isa, about_machine, choose_isa, folder_bytes, installed_bytes
from bench_prepare import Exporter, PrepareError, Workshop, missing, prepare
from bench_record import (
    Entry,
    Journal,
    MeasureError,
    Progress,
    compile_installed,
    make_key,
    run_job,
    source_stamp,
)
from bench_report import (
    SECTIONS,
    Section,
    keep_sections,
    text_of,
    with_peers_of,
    write_documents,
)
from bench_tables import EVALUATION, Values, summarize

from sdvino import settings
from sdvino.folder.index import ModelFolder
from sdvino.pipeline import StableDiffusionPipeline
from sdvino.runtime.topology import bf16_is_fast, read_cpu

RUNS = 3
#: bf16 takes torch longer than anybody waits where the processor has no arithmetic for it.
MOST_MINUTES = 30.0


class Bench:
    """One benchmark: what is measured, where it is kept."""

    def __init__(
        self,
        shop: Workshop,
        isa: Isa,
        cases: Sequence[Case],
        contenders: Sequence[Contender],
        runs: int,
        most_minutes: float = MOST_MINUTES,
    ) -> None:
        self.shop = shop
        self.isa = isa
        self.contenders = list(contenders)
        self.runs = runs
        self.most_minutes = most_minutes
        self.journal = Journal(shop.root / "journal.jsonl")
        self.machine = about_machine()
        self.notes = {case.name: self._how_made(case) for case in cases}
        self.cases = [case for case in cases if self._takes_part(case)]
        self._own = source_stamp((ROOT / "sdvino").rglob("*.py"))
        self._sizes: dict[tuple[str, str], int] = {}
        self.failed: set[tuple[str, str]] = set()

    def _takes_part(self, case: Case) -> bool:
        known = getattr(getattr(settings, "SpeedSettings", None), "__dataclass_fields__", {})
        lacking = missing_options(case, StableDiffusionPipeline.__call__, known)
        if lacking:
            _say(f"{case.name} is left out: this sdvino has no option {', '.join(lacking)}.")
        return not lacking

    def _how_made(self, case: Case) -> list[str]:
        peers = [c.name for c in runs_of(case, self.contenders) if c.format == "weights8"]
        if self.shop.exporter != "sdvino" or not peers:
            return []
        return [f"{' and '.join(peers)} ran 8-bit weights that sdvino's `int8-weights` made."]

    def missing(self) -> list[tuple[str, str]]:
        """Return what has to be made before measuring."""
        return missing(self.shop, formats_of(self.cases, self.contenders))

    def prepare(self) -> None:
        """Make the models that are not there.

        One that cannot be made (large models need more memory to quantize than to run) leaves its
        contenders out, and is noted. Raises PrepareError when that is the source of the others.
        """
        wanted = self.missing()
        progress = Progress([format_ for _, format_ in wanted])
        for arch, format_ in wanted:
            progress.begin(f"making {arch} as {format_}")
            started = time.perf_counter()
            try:
                prepare(self.shop, arch, format_)
            except PrepareError as error:
                if format_ == "source":
                    raise
                self._leave_out(arch, format_, error)
            progress.end(time.perf_counter() - started)

    def _leave_out(self, arch: str, format_: str, error: PrepareError) -> None:
        _say(f"bench_peers: {error}")
        for case in self.cases:
            for contender in runs_of(case, self.contenders):
                if (case.arch, contender.format) == (arch, format_):
                    self.failed.add((case.name, contender.name))
                    self.notes[case.name].append(_note(contender, error))

    def turns(self) -> list[tuple[Case, Contender, int]]:
        """Return the measurements in their order: everybody in turn, each run begun by another."""
        found = []
        for case in self.cases:
            taking_part = runs_of(case, self.contenders)
            for run in range(self.runs):
                first = run % len(taking_part)
                turn = taking_part[first:] + taking_part[:first]
                found += [(case, contender, run) for contender in turn]
        return found

    def measure(self) -> None:
        """Take every measurement that the journal does not hold; what fails is noted."""
        turns = self.turns()
        progress = Progress([f"{case.name} {contender.name}" for case, contender, _ in turns])
        for case, contender, run in turns:
            key = self.key(case, contender, run)
            if key in self.journal.entries or (case.name, contender.name) in self.failed:
                progress.end(None)
                continue
            progress.begin(f"{case.name}, {contender.name}, run {run + 1} of {self.runs}")
            started = time.perf_counter()
            try:
                self.journal.add(self._measure(case, contender, run, key))
            except MeasureError as error:
                self.failed.add((case.name, contender.name))
                self.notes[case.name].append(_note(contender, error))
                _say(f"{contender.name}: {error}")
            progress.end(time.perf_counter() - started)

    def _measure(self, case: Case, contender: Contender, run: int, key: str) -> Entry:
        cache = self.shop.root / "cache" / self.isa.label / case.name / contender.name
        if run == 0:  # the first start is one that finds nothing
            shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        job = self._job(case, contender, cache)
        return run_job(job, self.isa.environment, key, self.most_minutes)

    def _job(self, case: Case, contender: Contender, cache: Path) -> Any:
        folder = self.shop.folder(case.arch, contender.format)
        return make_job(
            case, contender, self.isa, folder=folder, result=Path(), cache=cache, pictures=1
        )

    def key(self, case: Case, contender: Contender, run: int) -> str:
        """Return the journal's key of a measurement."""
        job = asdict(self._job(case, contender, Path("cache")))
        del job["folder"]
        depends = {
            **job,
            "bytes": self.disk(case.arch, contender.format),
            "environment": dict(self.isa.environment),
            "bytecode": True,  # older journals have starts without
            "machine": self.machine,
            "sdvino": self._own if contender.runner == "sdvino" else "",
        }
        return make_key(self.isa.label, case.name, contender.name, run, depends)

    def disk(self, arch: str, format_: str) -> int:
        """Return the bytes of a model on disk."""
        if (arch, format_) not in self._sizes:
            self._sizes[arch, format_] = folder_bytes(self.shop.folder(arch, format_))
        return self._sizes[arch, format_]

    def sections(self, peaks: Peaks | None) -> list[Section]:
        """Return what was measured, a section for each case."""
        found: dict[str, Section] = {}
        for case in self.cases:
            own = {c.name: self._values(case, c) for c in runs_of(case, self.contenders)}
            like = None if case.like is None else found.get(case.like)
            values = with_peers_of(like, {name: of for name, of in own.items() if of})
            found[case.name] = Section(
                case.name,
                self.isa.label,
                date.today().isoformat(),
                self.machine,
                values,
                self._limit(case, values, peaks),
                [*([self.isa.note] if self.isa.note else []), *self.notes[case.name]],
            )
        return list(found.values())

    def _values(self, case: Case, contender: Contender) -> Values:
        """Return the values of a contender; none where it was not measured."""
        keys = [self.key(case, contender, run) for run in range(self.runs)]
        entries = [self.journal.entries[key] for key in keys if key in self.journal.entries]
        if not entries:
            return {}
        own = 0
        if contender.runner == "sdvino":  # installed from a checkout, or not at all
            own = folder_bytes(ROOT / "sdvino") + folder_bytes(ROOT / "models" / "shapes")
        return summarize(
            entries,
            cold=keys[0] in self.journal.entries,
            disk=self.disk(case.arch, contender.format),
            installed=own + installed_bytes(contender.installs),
        )

    def _limit(self, case: Case, values: dict[str, Values], peaks: Peaks | None) -> str:
        if peaks is None or case.like is not None or "sdvino" not in values:
            return ""
        folder = ModelFolder.open(self.shop.folder(case.arch, "sdvino"))
        work = count(folder, case.side)
        limit = limit_of(work, peaks, values["sdvino"][EVALUATION])
        return describe(work, peaks, limit)


def measured_peaks(isa: Isa) -> Peaks | None:
    """Measure the machine's peaks in a fresh process under ``isa``; None when that fails."""
    _say("measuring the machine's own peaks")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_limit.py")],
        env={**os.environ, **isa.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        _say("the peaks could not be measured: " + (done.stderr.splitlines() or ["?"])[-1])
        return None
    return Peaks(**json.loads(done.stdout)["peaks"])


def read_sources(pairs: Sequence[str]) -> dict[str, Path]:
    """Return the folders named as ARCH=FOLDER. Raises ChoiceError."""
    found = {}
    archs = {case.arch for case in CASES}
    for pair in pairs:
        arch, mark, name = pair.partition("=")
        folder = Path(name)
        if not mark or arch not in archs:
            raise ChoiceError(f"--source {pair}: write {'|'.join(sorted(archs))}=FOLDER.")
        if not (folder / "model_index.json").is_file():
            raise ChoiceError(f"--source {pair}: {folder} is no diffusers folder.")
        found[arch] = folder.resolve()
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--work", type=Path, required=True, help="models and journal; reused")
    made.add_argument("--cases", help=f"of {', '.join(case.name for case in CASES)}")
    made.add_argument("--peers", help="names as in the table, by commas; default: all")
    made.add_argument("--runs", type=int, help=f"fresh processes of each; default: {RUNS}")
    made.add_argument(
        "--most-minutes",
        type=float,
        default=MOST_MINUTES,
        help="give up on a process that takes longer; default: %(default)g",
    )
    made.add_argument("--isa", choices=ISAS, default="native")
    made.add_argument("--quick", action="store_true", help="one case, one run, models prepared")
    made.add_argument("--prepare", action="store_true", help="make the models and stop")
    made.add_argument(
        "--source", action="append", default=[], metavar="ARCH=FOLDER", help="instead of making it"
    )
    made.add_argument(
        "--exporter",
        choices=get_args(Exporter),
        default="optimum-intel",
        help="who makes the peers' 8-bit weights; sdvino's take a fraction of the memory to make",
    )
    made.add_argument("--no-limit", action="store_true", help="leave the machine's peaks out")
    made.add_argument("--fresh", action="store_true", help="forget what was measured before")
    made.add_argument("--output", type=Path, help="folder for performance.md, .json and .png")
    return made


def make_bench(options: argparse.Namespace) -> Bench:
    """Return the benchmark that the command line asks for. Raises ChoiceError."""
    cpu = read_cpu()
    isa = choose_isa(options.isa, cpu.isa, fast_bf16=bf16_is_fast(cpu))
    if isa.note:
        _say(isa.note)
    names = (QUICK_CASE,) if options.quick else DEFAULT_CASES
    cases = choose_cases(names if options.cases is None else options.cases.split(","))
    peers = None if options.peers is None else options.peers.split(",")
    contenders = choose_contenders(peers, isa=isa, quick=options.quick)
    runs = options.runs
    if runs is None:
        runs = 1 if options.quick else RUNS
    if runs < 1:
        raise ChoiceError(f"--runs is {runs}; give a whole number from 1 up.")
    if not options.most_minutes > 0:
        raise ChoiceError(f"--most-minutes is {options.most_minutes:g}; give a number above 0.")
    shop = Workshop(
        root=options.work,
        isa=isa.name,
        sources=read_sources(options.source),
        exporter=options.exporter,
    )
    if options.fresh:
        (options.work / "journal.jsonl").unlink(missing_ok=True)
    bench = Bench(shop, isa, cases, contenders, runs, options.most_minutes)
    if options.quick and bench.missing():
        what = ", ".join(f"{arch} as {format_}" for arch, format_ in bench.missing())
        raise ChoiceError(f"--quick makes no models, and {what} are missing; run --prepare first.")
    return bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, measure, print the tables and write the documents."""
    options = parser().parse_args(arguments)
    try:
        bench = make_bench(options)
    except ChoiceError as error:
        _say(f"bench_peers: {error}")
        return 2
    try:
        bench.prepare()
        if options.prepare:
            return 1 if bench.failed else 0
        _say("compiling what is installed to bytecode, if it is not")
        compile_installed()
        bench.measure()
        sections = bench.sections(None if options.no_limit else measured_peaks(bench.isa))
    except PrepareError as error:
        _say(f"bench_peers: {error}")
        return 1
    except KeyboardInterrupt:
        _say("Stopped; what was made and measured is kept: the same command goes on from there.")
        return 130
    print("\n\n".join(text_of(section) for section in sections))
    if options.output is not None:
        # Beside the documents, so that another machine adds to them.
        everything = keep_sections(options.output / SECTIONS, sections)
        write_documents(options.output, everything)
    return 1 if bench.failed else 0


def _note(contender: Contender, error: Exception) -> str:
    """Return what a document says of a failure: its first line, for the rest names folders."""
    return f"{contender.name} is left out: {str(error).splitlines()[0]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
