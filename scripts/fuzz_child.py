"""One command in a forked child: its own session, folders, output files and limits.

A child costs a fork rather than a start of Python and its imports. That asks for a parent without
threads, and without an ``ov.Core``: what they hold is lost in a child. Linux only (/proc).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

Command = Callable[[Sequence[str]], int]
#: done: it ended by itself. enough: it was working, and nobody needs to know how that ends.
End = Literal["done", "hang", "memory", "enough"]

ROOT = Path(__file__).resolve().parent.parent
#: As the console script that pip installs: the current folder is no place to import from.
_FRESH = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; from sdvino.cli.main import main; sys.exit(main())"
)
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_LOOK_SECONDS = 0.1
_SLEEP_SECONDS = 0.004
#: Processor seconds between two looks that are work: one tick of 0.01 s is what a timer takes.
_WORK_SECONDS = 0.015
_OUTPUT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may take before it counts as hanging, or as taking too much."""

    #: On the clock; four times that where other work has the processor.
    seconds: float = 60.0
    #: Of a processor, for each process.
    cpu_seconds: int = 40
    #: With every process of it asleep: it waits for what will not come.
    waiting_seconds: float = 5.0
    #: Resident, of all its processes together.
    memory: int = 3 * 10**9
    #: Of one file that it writes.
    file_bytes: int = 4 * 10**9


@dataclass(frozen=True, slots=True)
class Job:
    """What a child does, and where."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    cwd: Path
    #: Folder for what it prints.
    output: Path
    #: Seconds after which it is stopped, and that is right.
    enough: float | None = None
    #: A new interpreter, as from the shell, for what counts before any import.
    fresh: bool = False
    #: Who it runs as.
    user: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How a child ended and what it printed."""

    end: End
    #: The exit status, or a signal's number below 0.
    status: int
    seconds: float
    stdout: bytes
    stderr: bytes
    #: Python's stack where it hung, died or had taken too much.
    stack: str


class Child:
    """A running command; `poll` until it has a result."""

    def __init__(self, job: Job, command: Command, limits: Limits) -> None:
        self.job = job
        self.limits = limits
        self._started = self._looked = time.monotonic()
        #: Processor seconds by the last look, and for how long the group has been waiting.
        self._used = self._waited = 0.0
        job.output.mkdir(parents=True, exist_ok=True)
        #: How the first process ended, once it has.
        self._status: int | None = None
        self.pid = _fork(job, command, limits)

    def poll(self) -> Result | None:
        """Return the result once there is one; ends what is over its limits."""
        if self._ended():
            return self._result("done")
        now = time.monotonic()
        passed = now - self._looked
        if passed < _LOOK_SECONDS:
            return None
        self._looked = now
        end = self._over(now - self._started, passed)
        if end is None:
            return None
        if not self.job.fresh and end != "enough":
            self._ask_where()
        return self._result(end)

    def kill(self) -> None:
        """End every process of the session."""
        if sys.platform == "win32":
            return
        while True:
            members = {pid for pid, *_ in _session(self.pid)}
            if not self._ended():  # it may not be the leader of a session yet
                members.add(self.pid)
            if not members:
                return
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    def _ended(self) -> bool:
        if self._status is None and sys.platform != "win32":
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def _over(self, elapsed: float, passed: float) -> End | None:
        """Return how to end it, ``elapsed`` seconds after the start, ``passed`` after a look."""
        members, limits = _session(self.pid), self.limits
        if sum(memory for *_, memory in members) > limits.memory:
            return "memory"
        used = sum(seconds for _, seconds, _ in members)
        if used - self._used > _WORK_SECONDS:
            self._waited = 0.0
        elif any(_is_ready(pid) for pid, *_ in members):
            # Once in a while a timer wakes what waits; what gets no processor is always ready.
            self._waited = max(0.0, self._waited - passed)
        else:
            self._waited += passed
        self._used = used
        if self._waited > limits.waiting_seconds:
            return "hang"
        if self.job.enough is not None and elapsed > self.job.enough:
            return "enough"
        late = elapsed > limits.seconds and used > limits.seconds / 4
        return "hang" if late or elapsed > 4 * limits.seconds else None

    def _ask_where(self) -> None:
        """Let the child write its stack."""
        if sys.platform == "win32":
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)

    def _result(self, end: End) -> Result:
        seconds = time.monotonic() - self._started
        self.kill()
        status = 0 if self._status is None else self._status
        if sys.platform != "win32" and status == -signal.SIGXCPU:
            end = "hang"
        out, err, stack = (_head(self.job.output / name) for name in ("out", "err", "stack"))
        return Result(end, status, seconds, out, err, stack.decode("utf-8", "replace"))


def run(job: Job, command: Command, limits: Limits | None = None) -> Result:
    """Run one command to its end."""
    child = Child(job, command, Limits() if limits is None else limits)
    try:
        while True:
            result = child.poll()
            if result is not None:
                return result
            time.sleep(_SLEEP_SECONDS)
    except BaseException:
        child.kill()
        raise


def _head(path: Path) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_OUTPUT_BYTES)
    return b""


def _session(leader: int) -> list[tuple[int, float, int]]:
    """Return pid, processor seconds and resident bytes of each process of a session."""
    if sys.platform == "win32":
        return []
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    found = []
    for entry in os.scandir("/proc"):
        fields = _stat(entry.path) if entry.name.isdigit() else []
        if fields and int(fields[3]) == leader and fields[0] not in "ZX":
            seconds = sum(map(int, fields[11:15])) / tick
            found.append((int(entry.name), seconds, int(fields[21]) * page))
    return found


def _is_ready(pid: int) -> bool:
    """Tell whether a thread runs, waits for a processor (machines are busy) or for the disk."""
    with contextlib.suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return any(_stat(str(task))[:1] in (["R"], ["D"]) for task in tasks)
    return False


def _stat(path: str) -> list[str]:
    """Return proc(5)'s fields from the state on; none of what has ended."""
    try:
        text = Path(path, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The name before it, in brackets, may hold anything.
    return text.rpartition(")")[2].split()


def _fork(job: Job, command: Command, limits: Limits) -> int:
    if sys.platform == "win32":
        raise RuntimeError("This needs fork, which Windows does not have.")
    parent = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, under pytest
        pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setsid()
            # Whoever kills the fuzzer leaves nothing behind either.
            ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(status)
            _prepare(job, limits)
            status = _call(job, command)
        finally:
            os._exit(status & 0xFF)
    return pid


def _prepare(job: Job, limits: Limits) -> None:
    """Give this process its limits, output, folder and environment."""
    if sys.platform == "win32":
        return
    import resource

    gc.enable()
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
    ):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    # The first to go where memory runs out.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job.output / name, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    if not job.fresh:
        stack = (job.output / "stack").open("w")
        faulthandler.enable(stack)
        faulthandler.register(signal.SIGUSR1, stack)
        faulthandler.register(signal.SIGXCPU, stack, chain=True)
        # The file must live as long as the process.
        globals()["_stack"] = stack
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.environment)
    tempfile.tempdir = None  # what the parent's TMPDIR said
    if job.user is not None:
        os.setresuid(job.user, job.user, job.user)


def _call(job: Job, command: Command) -> int:
    """Run the command; return the status that the interpreter would."""
    if job.fresh:
        _start_fresh(job)
    sys.argv = ["sdvino", *job.arguments]
    try:
        status = command(list(job.arguments))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status


def _start_fresh(job: Job) -> NoReturn:
    os.execve(sys.executable, [sys.executable, "-c", _FRESH, *job.arguments], job.environment)
