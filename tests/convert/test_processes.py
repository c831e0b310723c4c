"""The parent's side of a worker process, with workers that only talk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sdvino.convert import processes
from sdvino.convert.processes import run_steps
from sdvino.convert.state import Files
from sdvino.convert.steps import Step
from sdvino.errors import ModelFolderError, RequestError, SdvinoError

Speak = Callable[[str], None]


class Heard:
    """What the parent was told."""

    def __init__(self) -> None:
        self.progress: list[tuple[str, float]] = []
        self.finished: dict[str, Files] = {}
        self.ticks = 0

    def tick(self) -> None:
        self.ticks += 1


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Heard]:
    """Return a function that runs a worker whose whole program is the text given."""
    (tmp_path / "logs").mkdir()

    def start(program: str) -> Heard:
        text = "import json, sys, time, os\n" + textwrap.dedent(program)

        def command(work: Path, steps: Sequence[Step]) -> list[str]:
            return [sys.executable, "-c", text]

        monkeypatch.setattr(processes, "command_of", command)
        heard = Heard()
        run_steps(
            tmp_path,
            [Step("export", "unet")],
            progress=lambda step, share: heard.progress.append((step, share)),
            finished=heard.finished.__setitem__,
            tick=heard.tick,
        )
        return heard

    return start


def test_what_a_worker_tells_arrives(run: Callable[[str], Heard]) -> None:
    heard = run(
        """
        print(json.dumps({"step": "export unet", "share": 0.25}), flush=True)
        print(json.dumps({"step": "export unet", "files": {"float/unet/a.bin": [3, "00ff"]}}))
        print("what a library says", file=sys.stderr)
        """
    )
    assert heard.progress == [("export unet", 0.25)]
    assert heard.finished == {"export unet": {"float/unet/a.bin": (3, "00ff")}}


def test_time_passes_while_a_worker_says_nothing(run: Callable[[str], Heard]) -> None:
    assert run("time.sleep(1.3)").ticks >= 2


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"type": "RequestError", "message": "no"}, RequestError),
        ({"type": "ModelFolderError", "message": "no"}, ModelFolderError),
        ({"type": "SdvinoError", "message": "no"}, SdvinoError),
        ({"type": "Unheard", "message": "no"}, SdvinoError),
        ({"type": "OSError", "arguments": [28, "no", None]}, OSError),
    ],
)
def test_an_error_comes_back_as_itself(
    run: Callable[[str], Heard], described: dict[str, object], expected: type[Exception]
) -> None:
    described = {**described, "traceback": ""}
    with pytest.raises(expected, match="no") as caught:
        run(f"print(json.dumps({{'error': {described!r}}})); sys.exit(1)")
    assert caught.type is expected


def test_a_worker_that_dies_says_its_last_words(run: Callable[[str], Heard]) -> None:
    with pytest.raises(SdvinoError, match=r"status 7 \(the last words\)"):
        run("print('the last words', file=sys.stderr); sys.exit(7)")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without a signal")
def test_a_worker_that_the_system_ends_suggests_memory(run: Callable[[str], Heard]) -> None:
    with pytest.raises(SdvinoError, match="memory"):
        run("os.kill(os.getpid(), 9)")


def test_who_stops_listening_ends_the_worker(run: Callable[[str], Heard], tmp_path: Path) -> None:
    note = tmp_path / "alive"
    with pytest.raises(ValueError, match="not enough values"):
        run(
            f"""
            print(json.dumps({{"step": "export unet", "files": {{"a": [1]}}}}), flush=True)
            time.sleep(2)
            open({str(note)!r}, "w").close()
            """
        )
    time.sleep(2.5)
    assert not note.exists()


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Its stdin closing is how it knows: here the parent closes it and waits."""
    import subprocess

    code = (
        "import time\nfrom sdvino.convert.worker import _end_with_parent\n"
        "_end_with_parent()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[2])},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == b"ready"
    worker.stdin.close()
    assert worker.wait(timeout=30) == 1
    worker.stdout.close()


def test_the_work_folder_is_told_when_its_plan_is_gone(tmp_path: Path) -> None:
    """A real worker, and a real error in it: no plan.json."""
    (tmp_path / "logs").mkdir()
    with pytest.raises(OSError, match="No such file"):
        run_steps(
            tmp_path,
            [Step("metadata")],
            progress=lambda step, share: None,
            finished=lambda step, files: None,
            tick=lambda: None,
        )


@pytest.mark.slow
def test_a_worker_imports_no_more_than_it_needs() -> None:
    """And whoever wants the rest later finds it."""
    program = """
    import gc, sys
    from sdvino.train.steps import _UNUSED, import_models
    import_models()
    print(sorted(sys.modules.keys() & {*_UNUSED}), "diffusers" in sys.modules)
    import scipy.stats, nncf
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[] True\n", 0), done.stderr


@pytest.mark.slow
def test_a_worker_reports_nothing_to_anybody(tmp_path: Path) -> None:
    """NNCF and OpenVINO's converter send usage reports unless the package for it is not there."""
    program = """
    import os, runpy, sys
    from contextlib import suppress
    kept = os.fdopen(os.dup(1), "w")
    with suppress(SystemExit):  # there is no plan
        runpy.run_module("sdvino.convert.worker", run_name="__main__")
    import nncf.telemetry
    import openvino.tools.ovc.telemetry_utils as converter
    print(type(nncf.telemetry.telemetry).__name__, converter.tm.__name__, file=kept, flush=True)
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    stdin, held = os.pipe()  # the worker would end with it
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), "export unet"],
        stdin=stdin,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(stdin)
    os.close(held)
    told = done.stdout.split()[-2:] if done.returncode == 0 else done.stderr
    assert told == ["MagicMock", "openvino.tools.ovc.telemetry_stub"]


def test_what_is_planted_in_a_work_folder_is_not_run(tmp_path: Path) -> None:
    """The folder may have come with somebody's archive."""
    (tmp_path / "logs").mkdir()
    canary = f"open({str(tmp_path / 'PLANTED')!r}, 'w').close()\n"
    for name in ("numpy", "json", "torch", "sitecustomize", "openvino"):
        (tmp_path / f"{name}.py").write_text(canary)
    (tmp_path / "sdvino").mkdir()
    (tmp_path / "sdvino" / "__init__.py").write_text(canary)
    with pytest.raises(OSError, match=r"plan\.json"):
        run_steps(
            tmp_path,
            [Step("metadata")],
            progress=lambda *_: None,
            finished=lambda *_: None,
            tick=lambda: None,
        )
    assert not (tmp_path / "PLANTED").exists()
    assert "Traceback" not in (tmp_path / "logs" / "metadata.txt").read_text()


def test_empty_entries_of_the_path_are_not_the_current_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "relative", ""]))
    path = processes._environment([Step("metadata")])["PYTHONPATH"].split(os.pathsep)
    assert path[1:] == [str(Path.cwd() / "relative")]
    assert all(Path(entry).is_absolute() for entry in path)
