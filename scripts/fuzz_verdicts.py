"""What counts as a wrong answer of a command, and how each is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fuzz_child import Result
from fuzz_files import CANARY, SECRET, snapshot
from PIL import Image

Snapshot = Mapping[str, tuple[int, int]]

#: Class -> what is wrong, for the table's legend.
CLASSES: Mapping[str, str] = {
    "unexpected": "an exception that nobody thought of",
    "exit": "an exit status that the message, or the input, does not fit",
    "hang": "no end, or no progress",
    "memory": "more memory than a command may take",
    "crash": "the process died by a signal",
    "escape": "control characters reach the terminal",
    "endless": "a message without end",
    "left": "something half-made was left",
    "planted": "code that came with the input ran",
    "leak": "what stands outside of the input came out",
    "outside": "a file outside of the input, or the input itself, was changed",
    "silent": "files that differ from their SHA-256 were taken without a word",
}
#: Status 1 is for what failed though the request was right: the words that say so, and why.
FAILURES: tuple[tuple[str, str], ...] = (
    (r"The disk (?:of .* )?is full", "the disk"),
    (r"not enough memory", "memory"),
    (r"File too large", "the disk"),
    (r"values that are not numbers|are not finite", "weights that draw nothing"),
    (r"hub cannot be reached|connect once", "no connection"),
    (r" failed on \S+ \(", "OpenVINO"),
    (r"does not take \S+ of the shape", "OpenVINO"),
    (r"Nothing could be measured", "no time, or OpenVINO"),
    (r"The profile could not be written", "the disk"),
    (r"The process of `.*` ended with status|The system ended the process", "a worker"),
    (r"cannot be (?:exported|converted)", "what the convert extra made of it"),
)
_SENTENCE = re.compile(r"^(?:sdvino|Error): .*\w \w", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_TEMPORARY = re.compile(r"(^|/)(\.writing-[^/]*|[^/]*\.(?:tmp|part|new))(/|$)")
_PICTURE = re.compile(r"\.(?:png|jpe?g|webp)$", re.IGNORECASE)
#: What no command may change: files outside of the input, and the input itself.
UNTOUCHED = ("outside/", "cwd/model/", "cwd/source/")
_LINE, _ALL = 4_000, 64_000
_SEARCHED_BYTES = 64 * 10**6
_FRAME = re.compile(r'File "[^"]*?/(sdvino/[^"]+)", line (\d+)')


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known beforehand of the right answer."""

    #: Nothing was damaged: it must succeed.
    healthy: bool = False
    #: Files differ from the manifest's SHA-256: exit 0 is wrong.
    silent: bool = False
    #: A folder that the command makes, relative to the scratch folder.
    target: str = "cwd/out"
    untouched: tuple[str, ...] = UNTOUCHED
    #: Pictures may hold what stands outside: the command itself names a file that leads there.
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A wrong answer: its class, and in a line what was seen."""

    kind: str
    why: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything that a fault is told from."""

    expected: Expected
    result: Result
    room: Path
    before: Snapshot
    after: Snapshot

    @property
    def made(self) -> list[str]:
        """Return the files that are new or changed."""
        return [name for name, seen in self.after.items() if self.before.get(name) != seen]

    @property
    def stderr(self) -> str:
        """Return stderr as text."""
        return self.result.stderr.decode("utf-8", "replace")


def judge(expected: Expected, result: Result, room: Path, before: Snapshot) -> list[Fault]:
    """Return every fault of an answer; ``before`` is the snapshot of ``room`` from before."""
    answer = Answer(expected, result, room, before, snapshot(room))
    found = ((kind, detect(answer)) for kind, detect in DETECTORS)
    return [Fault(kind, why) for kind, why in found if why is not None]


def place_of(text: str) -> str:
    """Return the last place in sdvino of a traceback, as file:line; empty without one.

    faulthandler's stacks begin with the innermost call, tracebacks end with it.
    """
    frames = _FRAME.findall(text)
    if not frames:
        return ""
    file, line = frames[0] if "most recent call first" in text else frames[-1]
    return f"{file}:{line}"


def _unexpected(answer: Answer) -> str | None:
    for line in answer.stderr.splitlines():
        if "An unexpected error" in line or line.startswith("Traceback"):
            return line[:160]
    return None


def _exit(answer: Answer) -> str | None:
    status, text = answer.result.status, answer.stderr
    if answer.result.end != "done" or status < 0:
        return None
    if status == 0:
        error = re.search(r"^(?:Error|Usage): .*", text, re.MULTILINE)
        return None if error is None else f"0, yet {error[0][:120]}"
    if answer.expected.healthy:
        return f"{status} for a healthy input: {_last(text)}"
    if status == 2:
        return None if _SENTENCE.search(text) else f"2 without a sentence: {_last(text)}"
    if status == 1 and any(re.search(pattern, text) for pattern, _ in FAILURES):
        return None
    return None if _unexpected(answer) else f"{status}: {_last(text)}"


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:160] if lines else "nothing"


def _hang(answer: Answer) -> str | None:
    if answer.result.end != "hang":
        return None
    return f"after {answer.result.seconds:.0f} s at {place_of(answer.result.stack) or 'unknown'}"


def _memory(answer: Answer) -> str | None:
    if answer.result.end != "memory":
        return None
    return f"at {place_of(answer.result.stack) or 'unknown'}"


def _crash(answer: Answer) -> str | None:
    if answer.result.end != "done" or answer.result.status >= 0:
        return None
    return f"signal {-answer.result.status} at {place_of(answer.result.stack) or 'unknown'}"


def _escape(answer: Answer) -> str | None:
    for name, output in (("stdout", answer.result.stdout), ("stderr", answer.result.stderr)):
        text = output.decode("utf-8", "replace")
        found = _CONTROL.search(text)
        if found is not None:
            return f"{name}: {text[max(0, found.start() - 40) : found.end() + 10]!r}"
    return None


def _endless(answer: Answer) -> str | None:
    text = answer.stderr
    longest = max(text.splitlines(), key=len, default="")
    if len(longest) > _LINE or len(answer.result.stderr) > _ALL:
        return f"{len(longest):,} characters in a line, {len(text):,} in all: {longest[:80]}"
    return None


def _left(answer: Answer) -> str | None:
    if answer.result.end != "done" or answer.result.status < 0:
        return None  # nobody can tidy up after being killed
    failed = answer.result.status != 0
    own = [name for name in answer.made if not name.startswith("output/")]
    for name in own:
        path = answer.room / name
        if _TEMPORARY.search(name) or name.startswith("tmp/"):
            return name
        if _PICTURE.search(name) and (failed or not _is_picture(path)):
            return f"{name}, {'though it failed' if failed else 'half-written'}"
        if failed and name.startswith(f"{answer.expected.target}/"):
            return name
    partial = [name for name in own if ".sdvino-partial/" in name and name not in answer.before]
    planted = any(".sdvino-partial" in name for name in answer.before)
    # Status 1 keeps what was finished, for the next run.
    return partial[0] if partial and answer.result.status in (0, 2) and not planted else None


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # whatever Pillow raises for what is no picture
        return False
    return True


def _planted(answer: Answer) -> str | None:
    return next((name for name in answer.made if name.endswith(CANARY)), None)


def _leak(answer: Answer) -> str | None:
    secret = SECRET.encode()
    for name, output in (("stdout", answer.result.stdout), ("stderr", answer.result.stderr)):
        if secret in output:
            return name
    for name in answer.made:
        path = answer.room / name
        if name.startswith("outside/") or (answer.expected.quoted and name.endswith(".png")):
            continue
        if 0 <= answer.after[name][0] < _SEARCHED_BYTES and secret in path.read_bytes():
            return name
    return None


def _outside(answer: Answer) -> str | None:
    gone = [name for name in answer.before if name not in answer.after]
    untouched = answer.expected.untouched
    return next((name for name in (*answer.made, *gone) if name.startswith(untouched)), None)


def _silent(answer: Answer) -> str | None:
    done = answer.result.end == "done" and answer.result.status == 0
    return "exit 0" if done and answer.expected.silent else None


#: In this order: what is told first is what a person would tell first.
DETECTORS: tuple[tuple[str, Callable[[Answer], str | None]], ...] = (
    ("planted", _planted),
    ("leak", _leak),
    ("outside", _outside),
    ("crash", _crash),
    ("hang", _hang),
    ("memory", _memory),
    ("unexpected", _unexpected),
    ("exit", _exit),
    ("escape", _escape),
    ("endless", _endless),
    ("left", _left),
    ("silent", _silent),
)
