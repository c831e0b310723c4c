"""What a person hears while a model is converted at first use: one sentence, a bar, drops."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdvino.first_use.store import LIMIT_VARIABLE, ConvertedModels, Entry, names_of
from sdvino.folder.hub import Report
from sdvino.inputs.shown import shown_seconds, shown_size

if TYPE_CHECKING:
    from sdvino.convert.api import Outlook


def announcement(
    name: str,
    outlook: Outlook,
    folder: Path,
    *,
    chosen: bool,
    gate_minutes: float | None,
    others: Sequence[str],
) -> str:
    """Return what a person is told before it begins: what happens, how long, and where it goes.

    chosen: whether the person named the recipe. gate_minutes: what comparing may take; None where
    nothing is compared. others: the recipes that the model was converted by before.
    """
    recipe = outlook.recipe.name
    why = "as asked for"
    if not chosen:
        what = "NNCF is installed" if recipe == "int8" else "NNCF, which int8 takes, is not"
        why = f"{what}; --recipe chooses another"
    made = sum(step.disk for step in outlook.steps if step.step.kind == "compress")
    compressed = recipe != "fp16"  # what is not is compared with nothing
    seconds = outlook.needs.seconds
    if compressed and gate_minutes is not None:
        seconds += 60.0 * gate_minutes
    sentences = [
        f"{name} ({outlook.source.family.title}) is converted once, to {recipe} ({why}): about"
        f" {shown_seconds(seconds)} on a small laptop, {shown_size(made)} in {folder}."
    ]
    if others:
        sentences.append(f"Before, it was converted to {' and '.join(others)}.")
    if outlook.download:
        sentences.append(f"First {shown_size(outlook.download)} are downloaded.")
    if compressed and gate_minutes is None:
        sentences.append("It is not compared with the uncompressed model; --gate does that.")
    sentences.append("Stopped, it goes on at the next start.")
    return " ".join(sentences)


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Show a bar with the step, the share done and the time left, on a terminal."""
    from tqdm import tqdm

    bar = tqdm(
        total=1.0,
        bar_format="{desc:24}{percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
        file=sys.stderr,
        disable=True if quiet else None,
        leave=False,
    )

    def show(what: str, share: float) -> None:
        bar.set_description_str(what, refresh=False)
        bar.update(max(0.0, share - bar.n))

    with bar:
        yield show


def above_bar(report: Report) -> Report:
    """Return ``report`` so that its lines do not run into a bar that is shown meanwhile."""
    from tqdm import tqdm

    def say(line: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            report(line)

    return say


def trim(store: ConvertedModels, keep: Entry, report: Report) -> None:
    """Keep the converted models within their limit, and say what that took."""
    removed = store.trim(keep)
    for (entry, size), name in zip(removed, names_of([e for e, _ in removed]), strict=True):
        used = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        report(
            f"Removed {name} ({shown_size(size)}, last used {used}): converted models are kept"
            f" within {shown_size(store.limit)} ({LIMIT_VARIABLE})."
        )
