"""What goes to the terminal, and what comes from it: text without control characters, paths."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import click

from sdvino.inputs.shown import lines, shortened


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print ``text``, which may quote a stranger's file: control characters as escapes."""
    click.echo(lines(text), err=err, nl=nl)


def show_usage_error(error: click.ClickException) -> None:
    """Print what click says of a wrong command line, to stderr."""
    said = io.StringIO()
    error.show(file=said)
    echo(shortened(said.getvalue(), 4000), err=True, nl=False)


class ShownFormatter(logging.Formatter):
    """Formats a line of the log with control characters as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return shortened(lines(super().format(record)), 4000)


class UserPath(click.Path):
    """A file or folder as `sdvino.inputs.files` reads its name; it need not exist."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; raises RequestError for what no file can be called."""
        from sdvino.inputs.files import user_path  # not for --help

        return user_path(value)


USER_PATH = UserPath()
