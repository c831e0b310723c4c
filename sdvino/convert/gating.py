"""The quality gate inside a conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.compress.gate import DEFAULT_MINUTES, Progress, Recompress, run_gate
from sdvino.compress.prompts import held_back
from sdvino.compress.recipes import Recipe
from sdvino.compress.report import write_report
from sdvino.compress.verdict import Verdict
from sdvino.errors import RequestError
from sdvino.folder.manifest import Suggested


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How a conversion is judged. Raises RequestError for values that cannot be."""

    #: Least median PSNR of the pictures, dB; None takes the recipe's own (see
    #: `sdvino.compress.thresholds`).
    min_psnr: float | None = None
    #: Minutes that comparing and mending may take together.
    minutes: float = DEFAULT_MINUTES

    def __post_init__(self) -> None:
        if self.min_psnr is not None and not 0.0 < self.min_psnr <= 99.0:
            raise RequestError(f"--min-psnr is {self.min_psnr:g}; give dB, above 0 and up to 99.")
        if not 0.0 < self.minutes <= 100_000.0:
            raise RequestError(
                f"--gate-minutes is {self.minutes:g}; give minutes above 0, or --no-gate."
            )


def judge(
    float_folder: Path,
    folder: Path,
    recipe: Recipe,
    settings: GateSettings,
    *,
    name: str,
    recompress: Recompress,
    prompts: Sequence[str],
    calibrated_on: Sequence[str],
    suggested: Mapping[str, Any],
    max_memory: int,
    progress: Progress,
    say: Callable[[str], None],
) -> Verdict:
    """Run the gate on ``folder`` and write report.md into it.

    ``prompts`` are all there are for this model; those in ``calibrated_on`` are not used. Both
    folders are run within ``max_memory`` bytes where that can be.
    """
    verdict = run_gate(
        float_folder,
        folder,
        recipe,
        recompress=recompress,
        prompts=held_back(prompts, calibrated_on),
        min_psnr=settings.min_psnr,
        minutes=settings.minutes,
        suggested=Suggested(**suggested),
        max_memory=max_memory,
        progress=progress,
        say=say,
    )
    if verdict.comparison is not None:
        write_report(folder, verdict, name=name)
    return verdict
