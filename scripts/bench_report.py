"""What bench_peers.py found, kept beside docs/performance.*, which are written from it.

One section for each case and instruction set; a new run replaces its own sections and leaves the
others, with their dates and machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench_cases import CASES, CONTENDERS, Contender
from bench_machine import machine_line
from bench_plots import plot_bars
from bench_tables import PICTURE, Row, Values, as_json, rows_of, table

#: Where the sections are kept, in the folder of the documents.
SECTIONS = "performance-sections.json"
_HEAD = """# Performance, side by side

Printed by `python scripts/bench_peers.py --work FOLDER --output docs`. Real architectures with
random weights: speed and memory do not depend on what the weights are. Every measurement is a fresh
process, taken in turn; medians. The same prompt, size, steps, guidance and scheduler (Euler) for
everybody. A first picture of one step brings everything into memory; the picture after it, of
another prompt, is the one that is timed. *First step* is from the start of the process to the first
evaluation of the UNet, imports included: the first start compiles, the second finds what sdvino and
the tuned peers kept of it (the system holds the files in memory both times). An evaluation is a
conditional or an unconditional one; a batch of two is two. *Hybrid* and *full* are optimum-intel's
quantization of the UNet, run with static shapes, in the fastest precision and with a cache, which
are no defaults of these peers. Peak memory is the RSS of the process tree, mapped files included.

![seconds per picture](performance.png)
"""


@dataclass(frozen=True, slots=True)
class Section:
    """The results of one case on one instruction set."""

    case: str
    isa: str
    date: str
    machine: dict[str, str]
    #: By contender.
    values: dict[str, Values]
    #: How far the UNet is from the machine's limit, in words.
    limit: str = ""
    #: What was left out or failed, a sentence each.
    notes: list[str] = field(default_factory=list)

    @property
    def contenders(self) -> list[Contender]:
        """Those that were measured, in the order of the table."""
        return [c for c in CONTENDERS if c.name in self.values]

    @property
    def rows(self) -> list[Row]:
        """The comparisons with each group of peers."""
        case = next(case for case in CASES if case.name == self.case)
        return rows_of(case, self.isa, self.contenders, self.values)


def read_sections(path: Path) -> list[Section]:
    """Return the sections kept at ``path``; none where there is no file."""
    if not path.is_file():
        return []
    return [Section(**value) for value in json.loads(path.read_text(encoding="utf-8"))]


def keep_sections(path: Path, new: Sequence[Section]) -> list[Section]:
    """Put ``new`` in the place of sections of the same case and instruction set; return all."""
    replaced = {(section.case, section.isa) for section in new}
    old = [s for s in read_sections(path) if (s.case, s.isa) not in replaced]
    order = [case.name for case in CASES]
    found = sorted([*old, *new], key=lambda s: (s.isa, order.index(s.case)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps([asdict(s) for s in found], indent=1), encoding="utf-8")
    temporary.replace(path)
    return found


def text_of(section: Section) -> str:
    """Return one section in Markdown."""
    title = next(case.title for case in CASES if case.name == section.case)
    parts = [
        f"## {section.isa}: {title}",
        f"`{section.case}`, {section.date}, {machine_line(section.machine)}.",
        table(section.contenders, section.values, section.rows),
    ]
    parts += [section.limit] if section.limit else []
    parts += section.notes
    return "\n\n".join(parts)


def write_documents(folder: Path, sections: Sequence[Section]) -> None:
    """Write performance.md, .json and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for section in sections for row in section.rows]
    text = json.dumps(as_json(rows), indent=2) + "\n"
    (folder / "performance.json").write_text(text, encoding="utf-8")
    document = "\n".join([_HEAD, *(text_of(section) + "\n" for section in sections)])
    (folder / "performance.md").write_text(document, encoding="utf-8")
    plot_bars([_panel(s) for s in sections], folder / "performance.png", label="seconds a picture")


def _panel(section: Section) -> tuple[str, list[tuple[str, str, float]]]:
    title = next(case.title for case in CASES if case.name == section.case)
    bars = [
        (c.name, str(c.group), section.values[c.name][PICTURE])
        for c in section.contenders
        if PICTURE in section.values[c.name]
    ]
    return f"{section.isa}: {title}", bars


def with_peers_of(like: Section | None, own: Mapping[str, Values]) -> dict[str, Values]:
    """Return ``own`` values beside those of the peers in the section ``like``."""
    peers = {} if like is None else {k: v for k, v in like.values.items() if k != "sdvino"}
    return {**own, **peers}
