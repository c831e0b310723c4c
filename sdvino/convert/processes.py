"""Runs the steps of a conversion in worker processes and passes on what they tell."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sdvino
from sdvino import errors
from sdvino.convert.state import Files
from sdvino.convert.steps import Step, StepProgress
from sdvino.errors import SdvinoError

_log = logging.getLogger("sdvino")

#: Where sdvino lies: what is there can be imported anyway, unlike what is in a work folder.
_PACKAGES = Path(sdvino.__file__).resolve().parent.parent
#: Called with the name of a step that is finished and its files.
Finished = Callable[[str, Files], None]

# glibc gives a freed block back to the system when it is larger than a threshold, which it raises
# by itself up to 32 MB: more than most weights. Other systems do not know these names.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "4"}
# Training makes and drops the same blocks over and over: kept, they cost nothing.
_MALLOC_OF_TRAINING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
# How often a caller hears that time passes while a step says nothing.
_TICK_SECONDS = 0.5


def run_steps(
    work: Path,
    steps: Sequence[Step],
    *,
    progress: StepProgress,
    finished: Finished,
    tick: Callable[[], None],
) -> None:
    """Do ``steps`` in one worker process; ``tick`` is called about twice a second.

    An error in the worker is raised here as the same exception, of one sentence. Whatever is
    raised here, by Ctrl-C or by ``progress``, ends the worker first.
    """
    work = work.absolute()
    log = work / "logs" / f"{steps[0].name.replace(' ', '-')}.txt"
    with log.open("wb") as stderr:
        worker = subprocess.Popen(
            command_of(work, steps),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=_PACKAGES,  # `python -m` looks for modules in the current folder first
            env=_environment(steps),
        )
        try:
            _listen(worker, progress, finished, tick)
            status = worker.wait()
        finally:
            _end(worker)
    if status:
        raise SdvinoError(_how_it_died(steps, status, log))


def command_of(work: Path, steps: Sequence[Step]) -> list[str]:
    """Return the command line of the worker for ``steps``."""
    names = [step.name for step in steps]
    return [sys.executable, "-m", "sdvino.convert.worker", str(work), *names]


def _listen(
    worker: subprocess.Popen[bytes],
    progress: StepProgress,
    finished: Finished,
    tick: Callable[[], None],
) -> None:
    """Pass on every line of the worker until it ends."""
    assert worker.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True)
    reader.start()
    while True:
        try:
            line = lines.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            tick()
            continue
        if line is None:
            return
        message = json.loads(line)
        if "error" in message:
            raise _error(message["error"])
        if "files" in message:
            files = {name: (size, digest) for name, (size, digest) in message["files"].items()}
            finished(message["step"], files)
        else:
            progress(message["step"], message["share"])


def _read(stream: Any, lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            stream.close()


def _error(described: Mapping[str, Any]) -> Exception:
    """Return the exception that a worker described."""
    _log.debug("%s", described["traceback"])
    if described["type"] == "OSError":
        return OSError(*described["arguments"])
    cls = getattr(errors, described["type"], SdvinoError)
    found: Exception = cls(described["message"])
    return found


def _how_it_died(steps: Sequence[Step], status: int, log: Path) -> str:
    names = " and ".join(step.name for step in steps)
    if status in (-9, 137):
        return (
            f"The system ended the process of `{names}`, probably because memory ran out;"
            " close other programs and run the command again."
        )
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    said = f" ({last[0][:200]})" if last else ""
    return f"The process of `{names}` ended with status {status}{said}; run the command again."


def _environment(steps: Sequence[Step]) -> dict[str, str]:
    """Return an environment in which a worker finds this very sdvino, and gives memory back."""
    malloc = _MALLOC_OF_TRAINING if any(step.trains for step in steps) else _MALLOC
    # An empty or relative entry would be looked for in another folder than it was meant for.
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(_PACKAGES), *(str(Path(entry).absolute()) for entry in known if entry)]
    return {
        **malloc,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # from Python 3.11 on: no current folder at all
    }
