"""What scripts/measure_toolbox.py has found so far, in a file: each part is measured by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluate_demo import Share
from toolbox_adherence import Adherence
from toolbox_models import Facts
from toolbox_timing import Duel, Times
from toolbox_variants import STACK


@dataclass(slots=True)
class Findings:
    """Everything that the page is written from, by the names of variants."""

    facts: dict[str, Facts] = field(default_factory=dict)
    adherence: dict[str, Adherence] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    #: The stack beside another, by the other's name.
    duels: dict[str, Duel] = field(default_factory=dict)
    #: What the times depend on; empty before there are any.
    machine: dict[str, Any] = field(default_factory=dict)
    #: What was found at Stable Diffusion's size (see toolbox_real); empty before.
    real: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Return what `save` wrote to ``path``; nothing is there: nothing was found."""
        if not path.is_file():
            return cls()
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            facts={name: Facts(**entry) for name, entry in value["facts"].items()},
            adherence={name: _adherence(entry) for name, entry in value["adherence"].items()},
            times={name: Times(**entry) for name, entry in value["times"].items()},
            duels={name: Duel(**entry) for name, entry in value.get("duels", {}).items()},
            machine=value["machine"],
            real=value["real"],
        )

    def save(self, path: Path) -> None:
        """Write everything to ``path``, over what is there only when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        new.replace(path)

    def forget_others(self, names: Mapping[str, str]) -> None:
        """Drop what was found of folders whose weights are no longer those of ``names``."""
        for name, weights in names.items():
            for table in (self.adherence, self.times):
                if name in table and table[name].weights != weights:
                    del table[name]
            for other, duel in list(self.duels.items()):
                drew = dict(zip((other, STACK), duel.weights, strict=True))
                if drew.get(name, weights) != weights:
                    del self.duels[other]


def _adherence(entry: dict[str, Any]) -> Adherence:
    shares = {
        one.name: Share(**entry[one.name])
        for one in fields(Adherence)
        if "Share" in str(one.type) and entry[one.name] is not None
    }
    return Adherence(**{**entry, **shares})
