"""Fixtures that several folders of tests use."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# NNCF and OpenVINO's converter would fork this process, by then large, to report each call to their
# makers: sdvino's own workers do without too.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

# torch and the libraries of models make millions of objects: to look for garbage at every 700 of
# them is a quarter of the time that importing takes.
gc.set_threshold(5_000, 10, 10)

# How fast a machine is that does other work besides says nothing about the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
#: The bundled demo model, converted, and its source weights.
SHAPES = ROOT / "models" / "shapes"
SHAPES_SOURCE = ROOT / "models" / "shapes-source"


@pytest.fixture(scope="session")
def shapes() -> Path:
    """The bundled demo model. Read only."""
    return SHAPES


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the compiled models of tests out of the user's cache, and share them within a run."""
    base = tmp_path_factory.getbasetemp() / "sdvino-cache"
    monkeypatch.setenv("SDVINO_CACHE_DIR", str(base))


class _SignalStack(ctypes.Structure):
    """glibc's stack_t."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def _no_signal_stack_of_openvino() -> None:
    """Take back the stack that OpenVINO's CPU plugin sets up for signal handlers.

    A Core that goes puts back the one from before it, which was freed if its Core went first: then
    the next signal, Ctrl-C say, is a segmentation fault. sdvino has one Core in a process; these
    tests have many.
    """
    if sys.platform == "linux":
        disable = _SignalStack(None, 2, 0)  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(disable), None)


@pytest.fixture
def shapes_copy(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that copies the demo model, to be damaged."""

    def copy() -> Path:
        folder = tmp_path / "model"
        shutil.copytree(SHAPES, folder)
        return folder

    return copy
