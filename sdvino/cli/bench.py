"""`sdvino bench`: what a model costs on this machine."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

import click

from sdvino.cli.options import (
    DEVICE_OPTIONS,
    MODEL_OPTIONS,
    device_options,
    model_folder,
    model_options,
    request_options,
    run_settings,
    taken,
)
from sdvino.cli.terminal import echo
from sdvino.errors import Cancelled, RequestError


@click.command("bench")
@model_options
@request_options("num_inference_steps", "guidance_scale", "scheduler")
@click.option(
    "--size",
    metavar="SIDE|WxH",
    help="Pixels, multiples of 8, such as 512 or 768x512.  [default: the model's]",
)
@click.option("-n", "pictures", type=int, default=3, show_default=True, help="Pictures to time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: seconds and bytes.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@device_options
def bench_command(
    size: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure a model on this machine: loading, each part, a picture, memory.

    \b
    sdvino bench
    sdvino bench -m FOLDER --steps 4 --size 512 --guidance-scale 1
    """
    settings = run_settings(**taken(options, DEVICE_OPTIONS))
    model = taken(options, MODEL_OPTIONS)
    width, height = parse_size(size)

    from tqdm import tqdm

    from sdvino.tuning.bench import measure_model

    folder = model_folder(**model, quiet=quiet)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(unit="step", disable=True if quiet else None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            report = measure_model(
                folder,
                settings=settings,
                width=width,
                height=height,
                progress=show,
                **options,
            )
        except KeyboardInterrupt:
            raise Cancelled("Cancelled; nothing was kept.") from None
    echo(json.dumps(asdict(report), indent=2) if as_json else report.table())


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Return width and height of ``SIDE`` or ``WxH``; raises RequestError for anything else."""
    if text is None:
        return None, None
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:[xX]\s*(\d{1,6}))?\s*", text)
    if found is None:
        raise RequestError(f"--size is {text!r}; write a side such as 512, or 768x512.")
    width = int(found[1])
    return width, width if found[2] is None else int(found[2])
