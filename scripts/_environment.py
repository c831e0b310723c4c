"""A virtual environment for a script of this folder. Standard library only, Linux and Windows."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def check_python() -> None:
    """Raise SetupError when this Python is not one that the dependencies are built for."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        have = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            f"This is Python {have}; run this script with Python 3.10, 3.11, 3.12 or 3.13."
        )


def python_of(folder: Path) -> Path:
    """Return the interpreter of the virtual environment in ``folder``."""
    if os.name == "nt":
        return folder / "Scripts" / "python.exe"
    return folder / "bin" / "python"


def ensure_environment(folder: Path, extras: str = "") -> Path:
    """Make a virtual environment with this project in it, or reuse a finished one.

    ``extras`` is what stands in brackets behind the project, such as ``convert,test``. The stamp is
    written last, so an interrupted installation is begun again. Returns the interpreter's path.
    """
    check_python()
    python = python_of(folder)
    stamp = folder / "sdvino-stamp.txt"
    if python.is_file() and stamp.is_file() and stamp.read_text() == _fingerprint(extras):
        return python
    started = time.perf_counter()
    if not python.is_file():
        _say(f"making a virtual environment in {folder.name}")
        try:
            venv.create(folder, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"No virtual environment could be made in {folder} ({error}). On Debian or Ubuntu,"
                " install python3-venv; elsewhere check the free space and your rights there."
            ) from error
    what = f".[{extras}]" if extras else "."
    _say(f"installing {what} (the first time takes minutes; it depends on your connection)")
    # Python compiles what is imported when it is: a third of what pip would, one file by one.
    command = [str(python), "-m", "pip", "install", "--no-compile"]
    command += ["--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, "--editable", what], cwd=ROOT, check=False).returncode:
        raise SetupError(
            "pip could not install the dependencies; its message stands above."
            " Check the connection and run the same command again."
        )
    stamp.write_text(_fingerprint(extras))
    _say(f"the environment is ready after {time.perf_counter() - started:.0f} s")
    return python


def run(python: Path, *arguments: str) -> int:
    """Run ``python`` with ``arguments`` from the project's root and return its exit status."""
    try:
        return subprocess.run([str(python), *arguments], cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        return 130


def _fingerprint(extras: str) -> str:
    project = (ROOT / "pyproject.toml").read_bytes()
    text = f"{extras}|{sys.version}|{ROOT}|".encode() + project
    return hashlib.sha256(text).hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
