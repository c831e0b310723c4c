"""The choices of local quantization for people: a table, and a heat map by layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdvino.compress.float_layers import short_name
from sdvino.compress.local_plan import Candidate, LocalPlan
from sdvino.compress.weight_coding import Coding

#: In a component's folder, beside its IR.
PLAN_FILE = "quantization.json"
HEAT_MAP_FILE = "quantization.png"

_HEAD = ("layer", "weights", "outliers", "kurtosis", "effect", "stored in", "error", "KB")
_LONGEST = 72
#: Errors below this share are drawn alike.
_LEAST_SHOWN = 1e-5


def write_plan(folder: Path, plan: LocalPlan) -> None:
    """Write the choices into a component's ``folder``, as JSON and, with matplotlib, a picture."""
    text = json.dumps(plan.to_dict(), indent=1, allow_nan=False)
    (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
    try:
        plot_heat_map(plan, folder / HEAT_MAP_FILE)
    except ImportError:
        return


def read_tables(folder: Path, components: Iterable[str]) -> list[str]:
    """Return the tables of the components in the model ``folder`` that have choices."""
    lines: list[str] = []
    for name in components:
        path = folder / name / PLAN_FILE
        if path.is_file():
            lines += table_lines(json.loads(path.read_text(encoding="utf-8")))
    return lines


def table_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return the table of a plan, as `LocalPlan.to_dict` gives it, in lines."""
    rows = [_HEAD, *(_cells(layer) for layer in plan["layers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [_headline(plan), *lines]


def _headline(plan: Mapping[str, Any]) -> str:
    share = plan["bytes"] / max(1, plan["half_precision_bytes"])
    text = (
        f"{plan['component']}: {plan['bytes'] / 1e6:.2f} MB, {share:.0%} of half precision"
        f" (budget {plan['budget'] / 1e6:.2f} MB)"
    )
    if plan["measured_on"]:
        return (
            f"{text}; error of the output held to be {plan['expected_error']:.2%}, from effects"
            f" measured on {plan['measured_on']} of its inputs"
        )
    return f"{text}; effects on the output were not measured"


def _cells(layer: Mapping[str, Any]) -> tuple[str, ...]:
    name = short_name(layer["name"])
    coding = layer["coding"]
    return (
        name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}",
        "x".join(map(str, layer["shape"])),
        f"{layer['outliers']:.3%}",
        f"{layer['kurtosis']:.1f}",
        f"{layer['effect']:.3g}",
        "half precision" if coding is None else str(Coding(**coding)),
        f"{layer['output_error']:.3%}",
        f"{layer['bytes'] / 1e3:.1f}",
    )


def plot_heat_map(plan: LocalPlan, path: Path) -> None:
    """Draw what each way to store a layer would cost the output, and which one it took.

    Rows are layers, from input to output; columns are bits and granularity, each by its best range.
    Raises ImportError without matplotlib.
    """
    import numpy as np

    from sdvino.compress.plots import draw_heat_map

    columns = _columns(plan)
    values = np.full((len(plan.layers), len(columns)), np.nan)
    taken: list[int] = []
    for row, choice in enumerate(plan.layers):
        for candidate in choice.facts.candidates:
            column = columns.index(_column(candidate))
            error = max(_LEAST_SHOWN, (choice.facts.effect * candidate.error) ** 0.5)
            values[row, column] = np.fmin(values[row, column], np.log10(error))
        taken.append(columns.index(_column(choice.taken)))
    draw_heat_map(
        values,
        [short_name(choice.facts.layer.name) for choice in plan.layers],
        columns,
        taken,
        path,
        title=f"{plan.component}: error of the output by layer and coding (ring: taken)",
        scale="log10 of the relative error",
    )


def _columns(plan: LocalPlan) -> Sequence[str]:
    found = {_column(c): _order(c) for choice in plan.layers for c in choice.facts.candidates}
    return sorted(found, key=lambda name: found[name])


def _column(candidate: Candidate) -> str:
    coding = candidate.coding
    if coding is None:
        return "16"
    group = "" if coding.group_size is None else f" {coding.group_size}"
    return f"{coding.bits} {coding.granularity}{group}"


def _order(candidate: Candidate) -> tuple[int, int, int]:
    """Order codings from the smallest to half precision."""
    coding = candidate.coding
    if coding is None:
        return 16, 0, 0
    size = 0 if coding.group_size is None else -coding.group_size
    return coding.bits, ("tensor", "channel", "group").index(coding.granularity), size
