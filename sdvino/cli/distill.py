"""`sdvino distill`: a student learns from its teacher."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvino.cli.terminal import USER_PATH, echo
from sdvino.errors import RequestError

if TYPE_CHECKING:
    from sdvino.train.distilling import DistilledFolder

#: Seconds between the lines that tell of progress where there is no terminal.
_BETWEEN_LINES = 30.0


@click.command("distill")
@click.argument("teacher", type=USER_PATH)
@click.option(
    "-o",
    "--out",
    type=USER_PATH,
    required=True,
    metavar="FOLDER",
    help="Where the student goes: a diffusers folder, complete, for `sdvino convert`.",
)
@click.option(
    "--student",
    type=USER_PATH,
    metavar="FOLDER",
    help="What learns: a diffusers folder, or that of a UNet, perhaps pruned.  [default: the"
    " teacher's own UNet]",
)
@click.option(
    "--objective",
    default="recover",
    show_default=True,
    metavar="recover|guidance|steps|consistency",
    help="The teacher's outputs, for a smaller student; its guidance, in one evaluation; many of"
    " its steps in a few, on ways that it draws first; the same by latent consistency.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=USER_PATH,
    metavar="FILE",
    help="Prompts that the teacher draws to learn from, one a line.  [default: its"
    " calibration_prompts.txt, or a general list]",
)
@click.option(
    "--pictures",
    type=USER_PATH,
    metavar="FOLDER",
    help="Learn from pictures instead, with captions beside them (x.png, x.txt) or in"
    " metadata.jsonl.",
)
@click.option("--iterations", type=int, help="Updates of the student.  [default: 1000]")
@click.option(
    "--minutes",
    type=float,
    help="Time to train for, instead of --iterations; the teacher draws before that.",
)
@click.option("--batch", type=int, help="Of an update.  [default: 16]")
@click.option("--learning-rate", type=float, help="At its highest.  [default: 0.0003]")
@click.option("--ema", type=float, help="Decay of the weights' average; 0: none. [default: 0.99]")
@click.option(
    "--guidance-scale", type=float, help="Of the teacher.  [default: what its folder suggests]"
)
@click.option("--student-steps", type=int, help="Steps the student is to take.  [default: 4]")
@click.option("--teacher-steps", type=int, help="Steps the teacher takes.  [default: 20]")
@click.option("--drawn", type=int, help="Pictures that the teacher draws.  [default: 512]")
@click.option(
    "--feature-weight",
    type=float,
    help="recover: weight of what the blocks give, beside the output.  [default: 1]",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Less memory, a third more time.  [default: for large UNets]",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--seed", type=int, help="[default: 0]")
@click.option(
    "--work",
    type=USER_PATH,
    metavar="FOLDER",
    help="Keep here what takes time: checkpoints, pictures drawn.  [default: a folder beside OUT,"
    " until it is done]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if sdvino distill made it.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def distill_command(
    teacher: Path,
    out: Path,
    student: Path | None,
    prompts_file: Path | None,
    pictures: Path | None,
    work: Path | None,
    overwrite: bool,
    quiet: bool,
    iterations: int | None,
    minutes: float | None,
    **given: Any,
) -> None:
    """Let a student learn from TEACHER, a diffusers folder, and write it to OUT.

    \b
    sdvino distill dreamshaper -o dreamshaper-4 --objective steps --prompts prompts.txt
    sdvino distill dreamshaper -o dreamshaper-lean --student lean/unet --pictures photos

    Ctrl-C keeps a checkpoint, and the same command goes on from it.
    """
    from sdvino.inputs.files import read_prompts
    from sdvino.train.distillation.settings import DistillSettings
    from sdvino.train.distilling import distill

    if iterations is not None and minutes is not None:
        raise RequestError("Give --iterations or --minutes, one of them.")
    chosen = {"iterations": iterations, "minutes": minutes, **given}
    settings = DistillSettings(**{key: v for key, v in chosen.items() if v is not None})
    with _progress(quiet) as show:
        found = distill(
            teacher,
            out,
            student=student,
            settings=settings,
            prompts=None if prompts_file is None else read_prompts(prompts_file),
            pictures=pictures,
            work=work,
            overwrite=overwrite,
            progress=show,
        )
    echo(summary(found))


def summary(found: DistilledFolder) -> str:
    """Return the lines that `sdvino distill` ends with."""
    figures = found.figures
    peak = figures.get("peak_memory_bytes")
    memory = "" if peak is None else f", {peak / 1e9:.1f} GB at most"
    lines = [
        f"{found.path}",
        f"  {figures['objective']}: {figures['iterations']} iterations of {figures['batch']} in"
        f" {figures['training_seconds'] / 60:.1f} min on {figures['device']}{memory}",
    ]
    if (found.path / "loss.png").is_file():
        lines.append(f"  curves: {found.path / 'loss.png'}")
    lines.append(f"Make it ready to draw: sdvino convert {found.path} FOLDER --recipe int8")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show each stage with its share done and the time left: a bar, or now and then a line."""
    if quiet:
        yield lambda stage, share: None
    elif not sys.stderr.isatty():
        yield Lines(time.monotonic).show
    else:
        bars = _Bars()
        try:
            yield bars.show
        finally:
            bars.close()


class Lines:
    """Tells of progress in lines, for logs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stage = ""
        self._began = self._said = 0.0
        self._from = 0.0

    def show(self, stage: str, share: float) -> None:
        """Tell that ``stage`` is done to ``share``, 0 to 1, unless it was told just now."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._from = stage, now, share
        elif share < 1.0 and now - self._said < _BETWEEN_LINES:
            return
        self._said = now
        done = share - self._from
        left = ""
        if done > 0.0 and share < 1.0:
            minutes, seconds = divmod(round((now - self._began) / done * (1.0 - share)), 60)
            left = f"  ({minutes}:{seconds:02} left)"
        echo(f"sdvino: {stage}: {share:.0%}{left}", err=True)


class _Bars:
    """One bar for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def show(self, stage: str, share: float) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                total=1.0,
                initial=share,
                desc=stage,
                bar_format="{desc:12}{percentage:5.1f}% |{bar}| {elapsed}<{remaining}",
                file=sys.stderr,
            )
        self._bar.update(max(0.0, share - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
