"""Do a recipe's passes to a source, and write what is left as a source: for `sdvino distill`.

    python scripts/apply_passes.py models/shapes-source build/lean-source --recipe docs/lean.toml

The new folder is the source's diffusers folder with the components that passes changed in the
place of its own, each with its structure.json. How the recipe stores components is left to the
conversion of that folder. Prints what each pass did. Needs the convert extra.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.convert.api import Outlook, look_ahead, make_request
from sdvino.convert.metadata import notes, passes_lines
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.source_passes import PASSES, history_of, pass_steps, passed_folder
from sdvino.convert.staging import staged
from sdvino.convert.worker import run_step
from sdvino.errors import RequestError, SdvinoError


@dataclass(frozen=True, slots=True)
class Done:
    """What was done to a source."""

    #: What each pass did, in order.
    passes: list[dict[str, Any]]
    #: Seconds of the processor that each step took; `record` records what passes measure on.
    cpu_seconds: dict[str, float]


def apply_passes(
    source: Path,
    out: Path,
    recipe: str | Path,
    progress: Callable[[str, float], None] = lambda step, share: None,
) -> Done:
    """Write ``source`` as the passes of ``recipe`` leave it to ``out``.

    ``progress`` is told the step and the share of it done. Raises RequestError for a source or a
    recipe that cannot be, and for an ``out`` that is not empty; then nothing is written.
    """
    outlook = look_ahead(make_request(source, recipe=recipe), out)
    if not isinstance(outlook.source, DiffusersFolder) or not outlook.recipe.passes:
        raise RequestError("Give a diffusers folder, and a recipe that has passes over it.")
    changed = {row.component for row in outlook.recipe.passes}
    with staged(out, overwrite=False) as folder, tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        done = _run(outlook, work, progress)
        # Files alone: a folder of the source may be write-protected, and so would be its copy.
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            name = file.relative_to(source)
            if name.parts[0] not in changed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
        for component in sorted(changed):
            made = passed_folder(work, outlook.recipe, component)
            assert made is not None
            shutil.copytree(made, folder / component)
        DiffusersFolder.open(folder)
    return done


def _run(outlook: Outlook, work: Path, progress: Callable[[str, float], None]) -> Done:
    (work / PASSES).mkdir()
    spent = {}
    for step, _ in pass_steps(outlook.source, outlook.plan, ""):
        before = time.process_time()
        run_step(outlook.plan, work, step.name, partial(progress, step.name))
        spent[step.name] = time.process_time() - before
    return Done(history_of(work, outlook.recipe), spent)


def show(step: str, share: float) -> None:
    """Show how far a step is, on one line of stderr."""
    print(f"\r{step:20}{share:5.0%} ", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder and print what each pass did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a diffusers folder")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--recipe", required=True, help="a TOML file with [[passes]]")
    parser.add_argument("--json", type=Path, help="write what each pass did here, too")
    options = parser.parse_args(arguments)
    try:
        done = apply_passes(options.source, options.out, options.recipe, show)
    except SdvinoError as problem:
        print(f"\napply_passes: {problem}", file=sys.stderr)
        return problem.exit_code
    except OSError as problem:
        print(f"\napply_passes: {problem.filename}: {problem.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
    print(file=sys.stderr)
    print("\n".join([*passes_lines(done.passes), *notes(done.passes)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
