"""Vendors' plugins: OpenVINO's own CPU plugin stands for one, under another name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openvino as ov
import pytest

from sdvino.cli.main import main
from sdvino.errors import DeviceError
from sdvino.runtime.plugins import parse_plugin, register_plugin
from sdvino.runtime.properties import DeviceFacts, compile_properties
from sdvino.settings import DeviceSettings

BARE = DeviceFacts(supported=frozenset({"DEVICE_ID"}), capabilities=frozenset({"FP16"}))


def cpu_library() -> Path:
    folder = Path(ov.__file__).parent / "libs"
    return next(path for path in folder.iterdir() if "intel_cpu_plugin" in path.name)


#: A process of its own: a device once registered stays.
SCRIPT = """
import json, sys
import numpy as np
from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline
from sdvino.cli.main import main
from sdvino.graph import prepare as rewrites
library, picture = sys.argv[1:]
options = ["--device", "XCPU", "--steps", "1", "--seed", "5", "-q", "-o", picture]
words = ["generate", "a red circle", "--plugin", "xcpu=" + library, *options]
status = main(words)
# In f32, as sdvino has it on a CPU: the plugin's own choice is bf16 on some processors.
there = RunSettings(default=DeviceSettings(device="XCPU", precision="f32"))
pipe = StableDiffusionPipeline.from_pretrained(settings=there, plugins={"XCPU": library})
arguments = {"num_inference_steps": 1, "seed": 5, "output_type": "latent"}
mine = pipe("a red circle", **arguments).images
# A device that nothing is known of runs linear layers as the graph has them; one that the first
# use finds slower is left for the CPU, which may run them otherwise.
differences = []
# What is rewritten for known CPUs alone rounds some numbers the other way; it is so rewritten where
# the plugin was left for the CPU.
for rewrite in (rewrites.zero_points_to_biases, lambda model: 0):
    rewrites.zero_points_to_biases = rewrite
    for kernel in ("matmul", "convolution"):
        device = DeviceSettings(linear_kernel=kernel, precision="f32", cache=False)
        settings = RunSettings(default=device)
        own = StableDiffusionPipeline.from_pretrained(settings=settings)
        differences.append(float(np.abs(mine - own("a red circle", **arguments).images).max()))
said = {"status": status, "difference": min(differences)}
said["device"] = pipe.components.unet(16, 16).compiled.get_property("EXECUTION_DEVICES")
print("\\n" + json.dumps(said, default=str))
"""


@pytest.mark.slow
def test_pictures_are_made_on_a_plugin(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cpu_library()), str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["status"] == 0
    assert (tmp_path / "x.png").is_file()
    # A graph that comes from the cache tells the name of the plugin that it was made by.
    assert "CPU" in str(said["device"])
    assert said["difference"] < 1e-4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CPU", "OpenVINO's own; give the plugin another name"),
        ("hetero", "OpenVINO's own"),
        ("", "cannot be called"),
        ("FP GA", "cannot be called"),
        ("FPGA.0", "cannot be called"),
        ("A" * 33, "cannot be called"),
        # OpenVINO asks that a plugin's own name is in the device's.
        (
            "FPGA",
            r"does not load as the plugin FPGA \(.*built for the OpenVINO that is running, 20",
        ),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said) as caught:
        register_plugin(name, cpu_library())
    assert "\n" not in str(caught.value)


def test_libraries_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="There is no plugin"):
        register_plugin("FPGA", tmp_path / "none.so")
    with pytest.raises(DeviceError, match="is no file"):
        register_plugin("FPGA", tmp_path)
    nonsense = tmp_path / "nonsense.so"
    nonsense.write_bytes(b"nonsense")
    for _ in range(2):  # the name is not taken by what failed
        with pytest.raises(DeviceError, match="must be built for the OpenVINO"):
            register_plugin("FPGA", nonsense)


@pytest.mark.parametrize("text", ["FPGA", "FPGA=", "=", ""])
def test_an_option_that_names_no_library_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match=r"NAME=LIBRARY|cannot be called"):
        register_plugin(*parse_plugin(text))


def test_the_commands_say_so_and_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"FPGA={tmp_path / 'none.so'}"
    assert main(["devices", "--plugin", missing]) == 2
    assert main(["generate", "a fox", "--plugin", missing, "-o", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("There is no plugin") == 2
    assert not (tmp_path / "x.png").exists()


def test_a_plugin_is_asked_only_for_what_it_takes() -> None:
    assert compile_properties(DeviceSettings(), "FPGA", {"FPGA": BARE}) == {}
    with pytest.raises(DeviceError, match="--streams"):
        compile_properties(DeviceSettings(num_streams=2), "FPGA", {"FPGA": BARE})
