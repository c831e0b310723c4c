"""Processes of sdvino that are killed, and what may be left of their work: see `kill.py`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
#: SIGKILL, which Windows has no name for.
KILL = signal.Signals(9)
SIGNALS = (KILL, signal.SIGTERM)
#: By this variable of its environment a process is known as one that was started here.
MARK = "SDVINO_KILL_MARK"
#: What a killed process and those that it started may take to end.
END_SECONDS = 20.0
POLL_SECONDS = 0.005
#: How the names begin, and end, of what is not finished, in the cache and beside pictures.
UNFINISHED = (".writing-", ".tmp")

#: Tells the phase that a run is in at this moment.
Look = Callable[[], str]


@dataclass
class Found:
    """What was done and what was wrong with it."""

    #: (phase, name of the signal) -> kills.
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: Runs that had ended before their kill came.
    spared: int = 0
    #: SIGTERMs before sdvino's first line, where Python's own answer is to end at once.
    early: int = 0
    #: Runs that came to their end after kills and were compared.
    compared: int = 0
    #: Of them, those that gave something else than an undisturbed run.
    differed: int = 0
    #: Files and folders where nothing may be left: beside a target, among pictures, in the cache.
    left: int = 0
    #: Processes that outlived the one that was killed.
    orphans: int = 0
    #: Each thing that was wrong, in a sentence.
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return how many kills there were."""
        return sum(self.kills.values())

    def note_left(self, names: Sequence[str], where: str) -> None:
        """Take down what is left where nothing may be."""
        self.left += len(names)
        self.wrong += [f"{name} was left {where}" for name in names]

    def note_differences(self, lines: Sequence[str], what: str) -> None:
        """Take down how a result is not that of an undisturbed run; none is what is wanted."""
        self.compared += 1
        self.differed += bool(lines)
        self.wrong += [f"{what}: {line}" for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under ``folder``, by its path there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return in words how the files ``found`` are not those ``expected``."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is too many" for name in found if name not in expected]
    both = [name for name in expected if name in found]
    return lines + [f"{name} differs" for name in both if found[name] != expected[name]]


def beside(target: Path) -> list[str]:
    """Return what stands in the folder of ``target`` that is not ``target``."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def unfinished(folder: Path) -> list[str]:
    """Return what under ``folder`` has the name of something that was never finished."""
    start, end = UNFINISHED
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.startswith(start) or path.name.endswith(end)
    )


def not_whole(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Return in words what in ``folder`` is not a whole picture, one of those ``expected``.

    What `unfinished` finds is left out.
    """
    known = set(expected.values())
    names = set(digests(folder)) - set(unfinished(folder))
    broken = {name: text for name in sorted(names) if (text := _damage(folder / name)) is not None}
    others = [n for n, digest in digests(folder).items() if n in names and digest not in known]
    lines = [f"{name} is no whole picture ({text})" for name, text in broken.items()]
    return lines + [f"{name} is another picture" for name in others if name not in broken]


def _damage(file: Path) -> str | None:
    """Return why ``file`` cannot be decoded, or None."""
    try:
        with Image.open(file) as picture:
            picture.load()
    except (OSError, SyntaxError) as error:
        return str(error)
    return None


class Run:
    """One `python -m sdvino ...`, with a mark by which all that it starts is known."""

    def __init__(self, words: Sequence[str], scratch: Path) -> None:
        """``scratch`` gets the cache and the temporary files of the process."""
        self.mark = uuid.uuid4().hex
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it is closed by close()
        (scratch / "temporary").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "SDVINO_CACHE_DIR": str(scratch / "cache"),
            "TMPDIR": str(scratch / "temporary"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sdvino", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
            cwd=ROOT,
        )

    @property
    def running(self) -> bool:
        """Tell whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def listening(self) -> bool:
        """Tell whether it has an answer of its own to SIGTERM by now."""
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "SigCgt":
                    return bool(int(value, 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self, seconds: float | None = None) -> tuple[int | None, str]:
        """Wait until it ends; return its status, None when it does not, and what it said."""
        try:
            status: int | None = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        self._errors.seek(0)
        return status, self._errors.read().decode("utf-8", "replace").strip()

    def orphans(self) -> int:
        """Return how many processes outlive it by more than a moment; they are ended."""
        deadline = time.monotonic() + END_SECONDS
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        end_all(left)
        return len(left)

    def close(self) -> None:
        """End it, and all that it started, whatever happens."""
        if self.running:
            self._process.kill()
        self._process.wait()
        self._errors.close()
        end_all(marked(self.mark))


def marked(mark: str) -> list[int]:
    """Return the processes that have the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def end_all(processes: Sequence[int]) -> None:
    """End the processes."""
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, KILL)


@contextlib.contextmanager
def started(words: Sequence[str], scratch: Path) -> Iterator[Run]:
    """Start sdvino; when the block ends, so has it."""
    run = Run(words, scratch)
    try:
        yield run
    finally:
        run.close()


def undisturbed(words: Sequence[str], scratch: Path, look: Look, found: Found) -> dict[str, float]:
    """Let a run come to its end; return the seconds of each phase. Exits when it fails."""
    phases: dict[str, float] = {}
    listened = False
    last = time.monotonic()
    with started(words, scratch) as run:
        while run.running:
            phase, now = look(), time.monotonic()
            phases[phase] = phases.get(phase, 0.0) + now - last
            last = now
            listened = listened or run.listening
            time.sleep(POLL_SECONDS)
        status, said = run.end()
    if status != 0:
        raise SystemExit(f"sdvino {words[0]} fails without being killed (status {status}): {said}")
    if not listened:
        found.wrong.append(f"sdvino {words[0]} never listened to SIGTERM")
    return phases


def choose_moment(phases: Mapping[str, float], rng: random.Random) -> tuple[str, float]:
    """Return a phase, and seconds into it, to kill at.

    Half of them are spread over time, half over phases: some are short, and matter as much.
    """
    names = list(phases)
    by_time = rng.random() < 0.5
    phase = rng.choices(names, [phases[n] if by_time else 1.0 for n in names])[0]
    return phase, rng.uniform(0.0, phases[phase])


def wait_for(run: Run, look: Look, order: Sequence[str], phase: str, offset: float) -> str | None:
    """Wait until a run is so far, or further; return its phase, or None when it has ended."""
    since = None
    while run.running:
        now = look()
        if now == phase and since is None:
            since = time.monotonic()
        late = since is not None and time.monotonic() - since >= offset
        if late or order.index(now) > order.index(phase):
            return now
        time.sleep(POLL_SECONDS)
    return None


def kill(run: Run, phase: str, number: signal.Signals, found: Found) -> None:
    """Kill a run, in the phase that it is in, and note how it ended."""
    listening = run.listening
    run.send(number)
    status, said = run.end(END_SECONDS)
    found.kills[phase, number.name] += 1
    if status is None:
        run.send(KILL)
        run.end()
    if (orphans := run.orphans()) != 0:
        found.orphans += orphans
        found.wrong.append(f"{orphans} processes outlived a {number.name} in {phase}")
    if status == -signal.SIGTERM and not listening:
        found.early += 1
    elif not is_good_end(status, said, number):
        how = "did not end" if status is None else f"ended with status {status}"
        found.wrong.append(f"a run that got {number.name} in {phase} {how}, saying {said[-300:]!r}")


def is_good_end(status: int | None, said: str, number: signal.Signals) -> bool:
    """Tell whether a run that got a signal ended as it should, or before it noticed."""
    if status == 0 or number == KILL:
        return status in (0, -KILL)
    lines = said.splitlines()
    sentence = bool(lines) and lines[-1].startswith("sdvino: ")
    return status == 130 and sentence and "Traceback" not in said
