"""The command `sdvino`: finds the sub-command, runs it, and turns exceptions into exit codes.

Exit 0 done, 1 it failed, 2 the request was wrong, 130 cancelled. Results go to stdout, progress and
messages to stderr. A traceback only with ``--debug``.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from sdvino import __version__
from sdvino.cli.terminal import ShownFormatter, echo, show_usage_error
from sdvino.errors import Cancelled, SdvinoError
from sdvino.inputs.shown import one_line, shortened

# Name of the command -> where it lives and the line that `sdvino --help` shows, so that neither
# --help nor one command pays for importing the others.
COMMANDS = {
    "generate": ("sdvino.cli.generate:generate_command", "Make pictures from a prompt."),
    "convert": ("sdvino.cli.convert:convert_command", "Turn a checkpoint into a model folder."),
    "distill": ("sdvino.cli.distill:distill_command", "Let a student learn from a model."),
    "tune": ("sdvino.cli.tune:tune_command", "Measure how a model runs fastest here."),
    "bench": ("sdvino.cli.bench:bench_command", "Measure a model on this machine."),
    "models": ("sdvino.cli.models:models_command", "List the models here, or remove some."),
    "devices": ("sdvino.cli.devices:devices_command", "Show the devices that can run a model."),
    "info": ("sdvino.cli.info:info_command", "Show what a model folder or a picture says."),
}


#: Errors of the system that say that a name was wrong from the start.
_WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None when there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdvino")
@click.option("--debug", is_flag=True, help="Show the traceback when something fails.")
def cli(debug: bool) -> None:
    """Stable Diffusion on the laptop you already have."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter("sdvino: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own); return the exit status."""
    # OpenVINO reports to its makers what it is used for, and looks for the home folder to do so;
    # it does without when this cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    # --debug is accepted anywhere on the line: people add it at the end when something failed.
    argv = (["--debug"] if debug else []) + [word for word in argv if word != "--debug"]
    _use_utf8()
    _end_by_signals()
    try:
        result: Any = cli.main(args=argv, prog_name="sdvino", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        show_usage_error(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort, Cancelled) as error:
        return _fail(str(error) or "Cancelled; nothing was left half-written.", 130, debug)
    except SdvinoError as error:
        return _fail(str(error), error.exit_code, debug)
    except MemoryError:
        return _fail("There is not enough memory; try a smaller picture.", 1, debug)
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): not an error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_os_error(error), 2 if error.errno in _WRONG_NAMES else 1, debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(f"An unexpected error: {what}. Run again with --debug to see where.", 1, debug)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    echo(f"sdvino: {shortened(one_line(message))}", err=True)
    return status


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "The disk is full; free some space and run the command again."
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}."


def _end_by_signals() -> None:
    """Let what asks a program to end do as Ctrl-C does, unless it is ignored (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


class _Ended(KeyboardInterrupt):
    """A signal asked the program to end.

    Not KeyboardInterrupt itself: when that is raised while some library's code is run, Python ends
    by SIGINT in the end, whatever was made of it.
    """


def _end(number: int, frame: object) -> None:
    raise _Ended


def _use_utf8() -> None:
    """Let prompts in any script be printed on consoles with a narrow code page (Windows)."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
