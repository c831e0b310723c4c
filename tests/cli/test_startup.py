"""What starting costs, told by what is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("openvino", "torch", "diffusers", "transformers", "optimum", "nncf", "PIL", "numpy")


def imported_by(code: str) -> set[str]:
    code += "\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    loaded = imported_by(f"from sdvino.cli.main import main; main({command})")
    assert not loaded & {"openvino", "torch", "diffusers", "transformers", "optimum", "nncf"}


def test_import_sdvino_imports_nothing_heavy() -> None:
    assert not imported_by("import sdvino") & set(HEAVY)


def test_the_runtime_leaves_the_converter_s_libraries_out() -> None:
    loaded = imported_by("from sdvino import StableDiffusionPipeline")
    assert "openvino" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "optimum", "nncf", "huggingface_hub"}
