"""What passes did to a model, for people: lines on the terminal, and passes.md in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdvino.inputs.shown import markdown

PASSES_FILE = "passes.md"

_HEAD = """\
# Passes

What was done to the weights of {name} before it was exported, in this order. The quality gate's
report, if there is one, compares with the model after these passes: what they cost is here, as the
distance of the component's output from what it was, on the pipeline's own inputs.
"""


def passes_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each pass: what it did, what is left, how far the output moved."""
    lines = []
    for entry in history:
        before, after = entry["before"], entry["after"]
        parts = [f"parameters {_share(after['parameters'], before['parameters'])}"]
        if after["nonzero"] * before["parameters"] < before["nonzero"] * after["parameters"]:
            parts.append(f"{1 - after['nonzero'] / after['parameters']:.1%} of them zero")
        parts.append(f"operations {_share(after['operations'], before['operations'])}")
        if entry["output_error"] is not None:
            parts.append(f"output moved by {entry['output_error']:.1%}")
        lines.append(f"{entry['component']}: {entry['what']}: {', '.join(parts)}")
    return lines


def notes(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what has to be said beside the figures, once each."""
    said = [entry["figures"]["note"] for entry in history if "note" in entry["figures"]]
    return list(dict.fromkeys(said))


def passes_report(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Return passes.md: the lines of all passes, and each one's figures by layer."""
    lines = [_HEAD.format(name=markdown(name))]
    lines += [f"{place}. {line}" for place, line in enumerate(passes_lines(history), 1)]
    for place, entry in enumerate(history, 1):
        lines += ["", f"## {place}. {entry['what']}, {entry['component']}", ""]
        if "note" in entry["figures"]:
            lines += [markdown(entry["figures"]["note"]), ""]
        lines += _figures(entry["figures"])
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from ("", f"| layer | {key.replace('_', ' ')} |", "|---|---|")
            yield from (f"| `{layer}` | {_cell(cell)} |" for layer, cell in value.items())
        elif key.endswith("_bytes"):
            yield f"- {key.removesuffix('_bytes').replace('_', ' ')}: {value / 1e9:.2f} GB"
        elif key != "note":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"- {key.replace('_', ' ')}: {shown}"


def _cell(value: Any) -> str:
    return f"{value[0]} of {value[1]}" if isinstance(value, list) else f"{value:.2%}"


def _share(after: int, before: int) -> str:
    return f"{after / 1e6:,.1f} M ({after / max(before, 1):.1%} of before)"
