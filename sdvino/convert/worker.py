"""One or more steps of a conversion in a process of its own, so that their memory ends with them.

    python -m sdvino.convert.worker WORKDIR STEP...

What to do stands in WORKDIR/plan.json. Lines of JSON go to stdout: {"step", "share"} while a step
runs, {"step", "files"} when it is finished, {"error"} when it failed. The process ends when its
stdin does: nothing goes on when the conversion was killed. Libraries are imported for the steps
that need them: torch for passes and for optimum-intel's exporter, NNCF to compress.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # NNCF and OpenVINO's converter report to their makers what is converted, each report from a
    # process forked from this one, hundreds in all; they do without when this cannot be imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import contextlib
import gc
import json
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from sdvino.convert.request import WorkPlan
from sdvino.convert.state import Files, files_under
from sdvino.convert.steps import Step
from sdvino.errors import RequestError, SdvinoError, said_by
from sdvino.inputs.files import FileLock

_LOCK_FILE = "worker-lock"

#: Writes the output of a step into the folder given; calls back with the share done.
StepFunction = Callable[[WorkPlan, Path, str, Path, Callable[[float], None]], None]


def main(arguments: Sequence[str]) -> int:
    """Run the steps named after the work folder; return the exit status."""
    work, names = Path(arguments[0]).absolute(), arguments[1:]
    out = _take_stdout()
    _end_with_parent()

    def tell(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    # A worker of a conversion that was killed may still be ending: it goes first.
    lock = FileLock(work / _LOCK_FILE)
    lock.acquire(wait=True)
    name = ""
    try:
        plan = WorkPlan.read(work)
        if __name__ == "__main__":
            _import_libraries(plan, names)
        for name in names:
            tell({"step": name, "share": 0.0})
            files = run_step(plan, work, name, partial(_tell_share, tell, name))
            tell({"step": name, "files": files})
    except BaseException as error:
        tell({"error": _describe(error, name)})
        return 1
    finally:
        lock.release()
    return 0


def _tell_share(tell: Callable[[Mapping[str, Any]], None], name: str, share: float) -> None:
    tell({"step": name, "share": share})


def run_step(plan: WorkPlan, work: Path, name: str, progress: Callable[[float], None]) -> Files:
    """Do one step and put its output in place; return the files it consists of."""
    step = Step.parse(name)
    run, places = STEPS[step.kind]
    output = work / "tmp" / name.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    run(plan, work, step.component, output, progress)
    files: Files = {}
    for place in places(step.component):
        files |= _publish(output, work, place, last=place == places(step.component)[-1])
    return files


def _publish(output: Path, work: Path, place: str, *, last: bool) -> Files:
    """Put the entries of ``output`` into ``work``/``place``; the last place gets them by rename."""
    files: Files = {}
    target = work / place
    if place.endswith("/"):  # entries of the step go beside those of others
        target.mkdir(parents=True, exist_ok=True)
        pairs = [(entry, target / entry.name) for entry in sorted(output.iterdir())]
    else:
        pairs = [(output, target)]
    for entry, goal in pairs:
        _remove(goal)
        if last:
            entry.rename(goal)
        elif entry.is_dir():
            shutil.copytree(entry, goal)
        else:
            shutil.copyfile(entry, goal)
        files |= files_under(goal, work)
    return files


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _metadata(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    from sdvino.convert.metadata import write_metadata
    from sdvino.convert.source_passes import scheduled_after

    write_metadata(scheduled_after(plan.open_source(work), plan.recipe), output)


def _record(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    from sdvino.train.steps import record_inputs

    record_inputs(plan, plan.open_source(work), output, progress)


def _pass(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    from sdvino.train.steps import run_pass

    run_pass(plan, plan.open_source(work), work, component, output, progress)


def _export(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    from sdvino.convert.export import export_component
    from sdvino.convert.metadata import write_component_config
    from sdvino.convert.source import DiffusersFolder
    from sdvino.convert.source_passes import with_passes
    from sdvino.runtime.mapped import pages_dropped

    source = with_passes(plan.open_source(work), plan, work, component)
    files = [output, *plan.request.files]
    if isinstance(source, DiffusersFolder):
        files += source.weights.get(source.components[component], ())
    with pages_dropped(files, writable=True):
        export_component(source, component, output, plan.request.exporter)
    write_component_config(source, component, output)


def _calibrate(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    from sdvino.compress.calibration import save_samples
    from sdvino.compress.component_recipe import CALIBRATED
    from sdvino.compress.folder import calibrate
    from sdvino.runtime.mapped import pages_dropped

    measured = {
        name: output / f"{name}.bin"
        for name in plan.quantized
        if plan.recipe.treatment(name) in CALIBRATED
    }
    with pages_dropped([path for path in (work / "float").iterdir() if path.is_dir()]):
        inputs = calibrate(work / "float", plan.calibration, progress, output.parent, measured)
    for name in plan.quantized:
        if name not in measured:
            save_samples(output / f"{name}.npz", inputs.of(name))


def _compress(
    plan: WorkPlan, work: Path, component: str, output: Path, progress: Callable[[float], None]
) -> None:
    source = work / "float" / component
    if plan.recipe.treatment(component) == "fp16":
        for file in source.iterdir():
            _link(file, output / file.name)
        return
    import openvino as ov

    from sdvino.compress.calibration import load_samples
    from sdvino.compress.folder import compress_component
    from sdvino.compress.local_report import write_plan
    from sdvino.compress.statistics import Statistics, has_statistics
    from sdvino.compress.targets import get_target
    from sdvino.graph.saving import given_names, save_graph
    from sdvino.runtime.mapped import pages_dropped

    xml = source / "openvino_model.xml"
    measured = work / "calibration" / f"{component}.bin"
    calibration: Statistics | list[dict[str, Any]] = []
    if component in plan.quantized:
        calibration = (
            Statistics(measured)
            if has_statistics(measured)
            else load_samples(measured.with_suffix(".npz"))
        )
    with pages_dropped([source]):
        model = compress_component(
            component,
            xml,
            plan.recipe.component(component),
            calibration,
            get_target(plan.request.target),
            progress,
            scratch=output.parent,
            planned=partial(write_plan, output),
        )
        # Layers are found by the names that they have in the float graph.
        standing = given_names(ov.Core().read_model(xml))
        save_graph(model, output / xml.name, name=component, standing=standing)
    for file in source.iterdir():
        if file.suffix not in (".xml", ".bin"):
            shutil.copyfile(file, output / file.name)


def _link(file: Path, copy: Path) -> None:
    """Give ``file`` a second name; where the disk knows no such thing, copy it."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


#: Kind of step -> what does it, and where its output goes: a folder that it replaces, or, with a
#: slash at the end, a folder that it adds to.
STEPS: Mapping[str, tuple[StepFunction, Callable[[str], list[str]]]] = {
    "metadata": (_metadata, lambda component: ["model/", "float/"]),
    "record": (_record, lambda component: ["inputs/"]),
    "pass": (_pass, lambda component: [f"passes/{component}"]),
    "export": (_export, lambda component: [f"float/{component}"]),
    "calibrate": (_calibrate, lambda component: ["calibration/"]),
    "compress": (_compress, lambda component: [f"model/{component}"]),
}


def _describe(error: BaseException, step: str) -> dict[str, Any]:
    """Return an exception as JSON that `sdvino.convert.processes` makes one of again."""
    described: dict[str, Any] = {
        "type": "SdvinoError",
        "message": str(error),
        "traceback": traceback.format_exc(),
    }
    if isinstance(error, SdvinoError):
        described["type"] = type(error).__name__
    elif isinstance(error, MemoryError):
        described["message"] = f"There is not enough memory to {step}; close other programs."
    elif isinstance(error, ImportError):
        extra = "convert" if step.startswith(("calibrate", "compress")) else "train"
        described["type"] = RequestError.__name__
        described["message"] = (
            f"Converting needs libraries that cannot be loaded here ({error});"
            f' install them with: pip install "sdvino[{extra}]".'
        )
    elif isinstance(error, OSError):
        described["type"] = "OSError"
        described["arguments"] = [error.errno, error.strerror, error.filename]
    else:
        described["message"] = f"The step `{step}` failed: {said_by(error)}"
    return described


def _import_libraries(plan: WorkPlan, names: Sequence[str]) -> None:
    """Import what the steps called ``names`` will want, in a process of their own.

    Importing makes millions of objects and nothing to collect: looking for it again and again
    takes a third of the time, and later collections would look at all of them each time.
    """
    steps = [Step.parse(name) for name in names]
    gc.disable()
    try:
        with contextlib.suppress(Exception):  # the step that needs it says so
            traced = plan.request.exporter != "sdvino"
            if any(step.kind == "pass" or (step.kind == "export" and traced) for step in steps):
                from sdvino.train.steps import import_models

                import_models()
            if any(
                step.kind == "compress" and plan.recipe.treatment(step.component) != "fp16"
                for step in steps
            ):
                import nncf  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _take_stdout() -> TextIO:
    """Return a stream to the process's stdout, and send what anything else prints to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return out


def _end_with_parent() -> None:
    """End this process when the one that started it is gone. Ctrl-C is that one's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        import ctypes

        # At once, even while a library computes without letting Python's threads run.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
