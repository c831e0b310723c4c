from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("needs fork and /proc", allow_module_level=True)

import fuzz
from fuzz_child import Child, Job, Limits, run
from fuzz_files import FILE_CHANGES, PLANTED, SECRET, Room, remove, snapshot
from fuzz_inputs import KINDS, build, sequence
from fuzz_mutate import BY_ENDING, mutate
from fuzz_templates import Templates, original_naming
from fuzz_verdicts import CLASSES, Expected, Fault, judge, place_of

from tests.conftest import ROOT, SHAPES_SOURCE

CORPUS = Path(__file__).with_name("fuzz_corpus.jsonl")
#: Kinds whose healthy originals need no OpenVINO to make.
LIGHT = ("source", "recipe", "work")
LIMITS = Limits(seconds=9.0, cpu_seconds=1, waiting_seconds=0.3, memory=700 * 10**6)
Stand = Callable[[Sequence[str]], int]


def say(text: str, status: int, stream: str = "stderr") -> Stand:
    """A command that prints and ends."""

    def command(_: Sequence[str]) -> int:
        getattr(sys, stream).write(text)
        return status

    return command


def write(name: str, content: str, status: int = 0) -> Stand:
    """A command that writes a file below the scratch folder."""

    def command(_: Sequence[str]) -> int:
        path = Path("..") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        sys.stderr.write("sdvino: It did not work.\n" if status else "")
        return status

    return command


def raises(_: Sequence[str]) -> int:
    raise KeyError("what nobody thought of")


def waits(_: Sequence[str]) -> int:
    time.sleep(60)
    return 0


def works(_: Sequence[str]) -> int:
    while True:
        pass


def dies(_: Sequence[str]) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def allocates(_: Sequence[str]) -> int:
    held = bytearray(b"x") * 900_000_000
    time.sleep(60)
    return len(held)


def in_a_child_of_its_own(_: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"]).returncode


def plants(_: Sequence[str]) -> int:
    Path("numpy.py").write_text(PLANTED, encoding="utf-8")
    subprocess.run([sys.executable, "-c", "import numpy"])
    return 0


REFUSED = "sdvino: This is no model; give another.\n"
#: Stand-in, the class of fault that it is to be, and what is expected of it.
WRONG: tuple[tuple[Stand, str, Expected], ...] = (
    (raises, "unexpected", Expected()),
    (say("sdvino: An unexpected error: KeyError: 1.\n", 1), "unexpected", Expected()),
    (say("sdvino: It did not work out.\n", 1), "exit", Expected()),
    (say("", 2), "exit", Expected()),
    (say("Error: there is no such thing\n", 0), "exit", Expected()),
    (say(REFUSED, 2), "exit", Expected(healthy=True)),
    (say(REFUSED, 3), "exit", Expected()),
    (waits, "hang", Expected()),
    (in_a_child_of_its_own, "hang", Expected()),
    (works, "hang", Expected()),
    (allocates, "memory", Expected()),
    (dies, "crash", Expected()),
    (say("name: \x1b[2J\n", 0, "stdout"), "escape", Expected()),
    (say("sdvino: This is \x9b31m red.\n", 2), "escape", Expected()),
    (say(f"sdvino: No {'x' * 4000} here.\n", 2), "endless", Expected()),
    (say("sdvino: No such word.\n" * 4000, 2), "endless", Expected()),
    (write("cwd/.0123.tmp", "x"), "left", Expected()),
    (write("cache/.writing-abc/blob", "x"), "left", Expected()),
    (write("cwd/.out.sdvino-partial/state.json", "{}", status=2), "left", Expected()),
    (write("cwd/out/sdvino.json", "{}", status=2), "left", Expected()),
    (write("cwd/picture.png", "half a picture"), "left", Expected()),
    (plants, "planted", Expected()),
    (write("cwd/report.md", f"prompt: {SECRET}"), "leak", Expected()),
    (say(f"sdvino: {SECRET} is no name.\n", 2), "leak", Expected()),
    (write("outside/secret.txt", "gone"), "outside", Expected()),
    (write("cwd/model/config.json", "{}"), "outside", Expected()),
    (say("", 0), "silent", Expected(silent=True)),
)


def faults(command: Stand, expected: Expected, folder: Path) -> list[str]:
    room = Room(folder)
    before = snapshot(folder)
    job = Job((), {**room.environment(), "PATH": os.environ["PATH"]}, room.cwd, folder / "output")
    return [fault.kind for fault in judge(expected, run(job, command, LIMITS), folder, before)]


@pytest.mark.parametrize(("command", "kind", "expected"), WRONG)
def test_every_detector_can_fail(
    command: Stand, kind: str, expected: Expected, tmp_path: Path
) -> None:
    assert faults(command, expected, tmp_path / "room") == [kind]


def test_every_class_has_a_stand_in() -> None:
    assert {kind for _, kind, _ in WRONG} == set(CLASSES)


@pytest.mark.parametrize(
    "command",
    [
        say("", 0),
        say(REFUSED, 2),
        say("sdvino: The disk is full; free some space and run the command again.\n", 1),
        say("Usage: sdvino info\n\nError: No such option: --nothing\n", 2),
        write("cwd/notes.txt", "x"),
        write("cache/entry/blob", "x"),
    ],
)
def test_right_answers_are_none_of_them(command: Stand, tmp_path: Path) -> None:
    assert faults(command, Expected(), tmp_path / "room") == []


def test_what_works_long_enough_is_let_go(tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    job = Job((), {}, room.cwd, tmp_path / "output", enough=0.1)
    result = run(job, works, LIMITS)
    assert (result.end, result.status) == ("enough", -signal.SIGKILL)
    assert judge(Expected(), result, room.path, snapshot(room.path)) == []


def test_the_stack_says_where_it_hung(tmp_path: Path) -> None:
    result = run(Job((), {}, tmp_path, tmp_path / "output"), waits, LIMITS)
    assert "in waits" in result.stack


def test_a_place_in_sdvino_is_the_innermost_of_a_traceback() -> None:
    frames = [
        f'  File "/x/sdvino/{name}.py", line {line}, in f' for name, line in (("a", 1), ("b", 2))
    ]
    assert place_of("\n".join(["Traceback (most recent call last):", *frames])) == "sdvino/b.py:2"
    assert place_of("\n".join(["(most recent call first):", *frames])) == "sdvino/a.py:1"
    assert place_of("") == ""


def test_no_process_outlives_a_child(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def command(_: Sequence[str]) -> int:
        started = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        pids.write_text(" ".join(str(process.pid) for process in started), encoding="utf-8")
        return 0

    child = Child(Job((), dict(os.environ), tmp_path, tmp_path / "output"), command, LIMITS)
    while child.poll() is None:
        time.sleep(0.01)
    for pid in pids.read_text(encoding="utf-8").split():
        state = Path("/proc", pid, "stat")
        assert not state.exists() or ") Z " in state.read_text(encoding="utf-8")


def test_the_child_has_folders_environment_and_input_of_its_own(tmp_path: Path) -> None:
    def command(words: Sequence[str]) -> int:
        print(words, Path.cwd(), sorted(os.environ), sys.stdin.read())
        return 0

    room = Room(tmp_path / "room")
    result = run(Job(["info"], {"HOME": "/h"}, room.cwd, tmp_path / "output"), command, LIMITS)
    assert result.stdout.decode() == f"['info'] {room.cwd} ['HOME'] \n"


def described(folder: Path) -> dict[str, bytes]:
    """Everything in a folder: bytes of files, targets of links, kinds of the rest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink()).encode()
        elif path.is_file() and path.stat().st_size < 2**30:
            found[name] = path.read_bytes()
        else:
            found[name] = oct(path.lstat().st_mode).encode()
    return found


@pytest.mark.parametrize("kind", LIGHT)
def test_the_same_number_makes_the_same_input(kind: str, tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    differ = False
    for number in (1, 2):
        made = []
        for name in ("one", "two"):
            room = tmp_path / name
            case = build(kind, 7, number, room, templates)
            made.append((case.job.arguments, case.changes, described(room)))
            remove(room)
        assert made[0] == made[1]
        other = build(kind, 8, number, tmp_path / "three", templates)
        differ |= other.changes != made[0][1]
        remove(tmp_path / "three")
    assert differ


@pytest.mark.parametrize("ending", [*BY_ENDING, ".bin"])
def test_mutators_repeat_themselves_and_take_anything(ending: str) -> None:
    contents: tuple[bytes, ...] = (
        b"",
        b"\xff\x00",
        b'{"a": [1, {"b": 2}]}',
        b'<a b="1"><layer/></a>',
        b"a = 1\n[b]\n",
    )
    contents = (*contents, b"[" * 400 + b"]" * 400, b"7", b'{"a": {"dtype": "F16", "shape": 1}}')
    for seed in range(240):
        content = contents[seed % len(contents)]
        for _ in range(3):  # what one has damaged goes to the next
            after = mutate(Random(seed), content, ending)
            assert after == mutate(Random(seed), content, ending)
            content = after[0]


@pytest.mark.parametrize("what", FILE_CHANGES)
def test_a_file_becomes_what_no_file_is(what: str, tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    path = room.cwd / "model" / "config.json"
    path.parent.mkdir()
    path.write_text('{"a": 1}', encoding="utf-8")
    before = snapshot(room.cwd)
    FILE_CHANGES[what](room, path)
    assert what == "unreadable" or snapshot(room.cwd) != before
    remove(room.path)
    assert not room.path.exists()


def test_links_lead_to_the_secret(tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    for what in ("a link outside", "its folder is a link outside"):
        path = room.cwd / what.replace(" ", "-") / "config.json"
        path.parent.mkdir()
        path.write_text('{"a": 1}', encoding="utf-8")
        FILE_CHANGES[what](room, path)
        assert json.loads(path.read_text(encoding="utf-8"))["token"] == SECRET
        assert room.outside in path.resolve().parents


def test_what_is_healthy_comes_first_and_weights_count() -> None:
    numbers = sequence(("model", "work"))
    found = [next(numbers) for _ in range(2 + KINDS["model"].weight + 1)]
    assert found[:3] == [("model", 0), ("work", 0), ("model", 1)]
    assert found[-1] == ("work", 1)


def test_the_table_and_the_lines(tmp_path: Path) -> None:
    templates = Templates(tmp_path)
    case = build("recipe", 0, 0, tmp_path / "room", templates)
    tally = fuzz.Tally(seconds=3.0)
    tally.inputs["recipe"] = 2
    tally.faults.append((case, Fault("crash", "signal 11 at \x1b[2J")))
    assert tally.table().splitlines() == [
        "kind      inputs  crash",
        "recipe    2       1",
        "together  2       1",
        "2 inputs, 1 wrong, 3 s",
    ]
    assert tally.lines() == ["crash: signal 11 at \\x1b[2J; ; --replay recipe:0:0"]
    corpus = tmp_path / "corpus.jsonl"
    for _ in range(2):
        fuzz.record(corpus, tally.faults)
    assert fuzz.read_corpus(corpus, ("recipe",)) == [("recipe", 0, 0)]
    assert fuzz.read_corpus(corpus, ("model",)) == []


def test_the_corpus_names_inputs() -> None:
    lines = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"kind", "seed", "number", "why"} for line in lines)
    assert len(fuzz.read_corpus(CORPUS, tuple(KINDS))) == len(lines)


def test_the_checkpoint_has_the_original_names() -> None:
    names = original_naming(SHAPES_SOURCE)
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in names
    assert "first_stage_model.decoder.up.0.block.0.conv1.weight" in names
    assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in names


def script(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "fuzz.py"), *arguments]


@pytest.mark.slow
def test_a_minute_of_hostile_input_gets_right_answers() -> None:
    command = script("--seconds", "60", "--seed", "0", "--corpus", str(CORPUS))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_what_is_healthy_succeeds() -> None:
    done = subprocess.run(script("--inputs", str(len(KINDS))), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{len(KINDS)} inputs, 0 wrong" in done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_and_shows_the_table(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        script("--only", "recipe", "--seconds", "600"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    process.stderr.readline()  # it is under way
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "together" in out
    assert list(tmp_path.iterdir()) == []
