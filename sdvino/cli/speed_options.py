"""Options that trade likeness or seconds: step caching and the like, and the memory limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from sdvino.inputs.shown import parse_size
from sdvino.settings import FAST, GUIDANCE_MODES, RunSettings, SpeedSettings

F = TypeVar("F", bound=Callable[..., Any])

#: The parameters that `speed_options` adds, but for ``fast``; each is a field of `SpeedSettings`.
SPEED_OPTIONS = tuple(field.name for field in fields(SpeedSettings))
#: Option -> how many times as fast it draws the demo model's pictures, and the points by which
#: fewer (-) or more (+) of them are right: docs/fast.md, which says how sure that is.
MEASURED: Mapping[str, tuple[float, float]] = {
    "--fast": (1.5, -0.6),
    "--guidance-interval 0 0.8": (1.1, 0.8),
    "--token-downsampling 2": (0.9, -1.6),
    "--cache-interval 2": (1.5, -0.8),
    "--tiny-vae": (0.9, -13.0),
}


def speed_options(command: F) -> F:
    """Add ``--fast`` and the options that it is made of."""
    start, end = (0.0, 1.0) if FAST.guidance_interval is None else FAST.guidance_interval
    for option in reversed(
        [
            click.option(
                "--fast",
                is_flag=True,
                help=f"Sooner, and a little off: --guidance-interval {start:g} {end:g}"
                f" --token-downsampling {FAST.token_downsampling}"
                f" --cache-interval {FAST.cache_interval}."
                f" {_measured('--fast')}",
            ),
            click.option(
                "--guidance-interval",
                type=(float, float),
                metavar="START END",
                help="Guide only in this part of the steps, as fractions."
                f" {_measured('--guidance-interval 0 0.8')}  [default: 0 1]",
            ),
            click.option(
                "--guidance-mode",
                type=click.Choice(GUIDANCE_MODES),
                help="Two predictions one by one, in one batch, or in two streams.",
            ),
            click.option(
                "--token-downsampling",
                type=int,
                help="Thin what large self-attentions read: 2 or 4."
                f" {_measured('--token-downsampling 2')}  [default: 1, off]",
            ),
            click.option(
                "--cache-interval",
                type=int,
                help="Run the deep part of the UNet every so many steps."
                f" {_measured('--cache-interval 2')}  [default: 1, off]",
            ),
            click.option(
                "--cache-branch",
                type=int,
                help="Skip connection where that part begins; 0 is fastest.  [default: 0]",
            ),
            click.option(
                "--tiny-vae/--no-tiny-vae",
                default=None,
                help="Decode with the model's tiny decoder."
                f" {_measured('--tiny-vae')}  [default: no]",
            ),
        ]
    ):
        command = option(command)
    return command


def _measured(option: str) -> str:
    """Return what an option was found to gain and to cost, as a sentence."""
    faster, points = MEASURED[option]
    values = option.partition(" ")[2]
    which = f" with {values}" if values else ""
    # That model is small: what takes work from large pictures gains it nothing.
    gain = f"{faster:.1f} x as fast" if faster > 1.0 else "too small to gain time"
    return f"The demo model{which}: {gain}, prompt adherence {points:+.1f} points."


def memory_options(command: F) -> F:
    """Add ``--max-memory`` and ``--low-memory``."""
    for option in reversed(
        [
            click.option(
                "--max-memory",
                metavar="SIZE",
                help="Stay under so much memory, such as 3GB, at a cost in time.",
            ),
            click.option(
                "--low-memory",
                is_flag=True,
                help="Hold one piece of the UNet at a time: least memory, several times slower.",
            ),
        ]
    ):
        command = option(command)
    return command


def speed_settings(
    fast: bool, options: Mapping[str, Any], like: SpeedSettings | None
) -> SpeedSettings:
    """Return the settings: those given, else the picture's to repeat or those of ``--fast``."""
    base = FAST if fast else SpeedSettings() if like is None else like
    given = {name: options[name] for name in SPEED_OPTIONS if options[name] is not None}
    return replace(base, **given)


def with_memory(settings: RunSettings, max_memory: str | None, low_memory: bool) -> RunSettings:
    """Return ``settings`` with the memory options put in; raises RequestError."""
    limit = None if max_memory is None else parse_size(max_memory)
    return replace(settings, max_memory=limit, low_memory=low_memory)
