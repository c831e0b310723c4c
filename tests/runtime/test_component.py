from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.errors import DeviceError, ModelFolderError, SdvinoError
from sdvino.graph.timestep import float_timestep
from sdvino.graph.walk import reshape_static
from sdvino.runtime.component import Component
from sdvino.runtime.core import short_reason
from sdvino.settings import DeviceSettings
from tests.tiny_folder import (
    convolution,
    finish,
    make_tiny_folder,
    parameter,
    save,
    unet,
    vae_decoder,
)

ROOT = Path(__file__).resolve().parents[2]
INPUTS: dict[str, Any] = {
    "sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32),
    "timestep": np.array([250.5], np.float32),
    "encoder_hidden_states": np.ones((1, 77, 32), np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model") / "model")


def prepare(model: ov.Model) -> None:
    float_timestep(model)
    reshape_static(
        model, {"sample": [1, 4, 8, 8], "timestep": [1], "encoder_hidden_states": [1, 77, 32]}
    )


def make(folder: Path, **settings: Any) -> Component:
    xml = folder / "unet" / "openvino_model.xml"
    return Component("unet", xml, DeviceSettings(**settings), prepare=prepare)


def expected(sample: Any, timestep: float) -> Any:
    """The graph of `tests.tiny_folder.unet`, in NumPy."""
    weights = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32) / 10
    padded = np.pad(sample, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weights) + timestep / 1000 + 1


DEVICES: list[dict[str, Any]] = [
    {"device": "CPU"},
    {"device": "AUTO"},
    {"device": "AUTO:CPU"},
    {"device": "HETERO:CPU"},
    {"num_streams": 2},
    {"num_threads": 1, "core_type": "any", "pinning": False, "hyper_threading": False},
    {"performance_hint": "throughput"},
]


@pytest.mark.parametrize("settings", DEVICES, ids=str)
def test_it_computes_the_same_everywhere(settings: dict[str, Any], folder: Path) -> None:
    unet = make(folder, **settings)
    out = unet.infer(INPUTS)["out_sample"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected(INPUTS["sample"], 250.5), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_it_computes_the_same_on_a_gpu(folder: Path) -> None:
    if not any(name.startswith("GPU") for name in ov.Core().available_devices):
        pytest.skip("OpenVINO finds no GPU here")
    for settings in ({"device": "GPU", "precision": "f32"}, {"device": "HETERO:GPU,CPU"}):
        out = make(folder, **settings).infer(INPUTS)["out_sample"]
        np.testing.assert_allclose(out, expected(INPUTS["sample"], 250.5), rtol=1e-2, atol=1e-2)


def test_load_and_unload(folder: Path) -> None:
    unet = make(folder)
    assert not unet.loaded
    unet.load()
    assert unet.loaded
    first = unet.infer(INPUTS)["out_sample"].copy()
    unet.unload()
    assert not unet.loaded
    np.testing.assert_array_equal(unet.infer(INPUTS)["out_sample"], first)


def test_the_settings_reach_the_device(folder: Path) -> None:
    compiled = make(folder, num_threads=1, num_streams=1).compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("NUM_STREAMS") == 1


def test_outputs_are_views_that_the_next_call_writes_again(folder: Path) -> None:
    unet = make(folder)
    first = unet.infer(INPUTS)["out_sample"]
    kept = first.copy()
    second = unet.infer({**INPUTS, "timestep": np.array([0.0], np.float32)})["out_sample"]
    assert np.shares_memory(first, second)
    assert not np.array_equal(first, kept)


def test_inputs_of_other_types_and_layouts(folder: Path) -> None:
    unet = make(folder)
    wanted = unet.infer(INPUTS)["out_sample"].copy()
    turned = np.ascontiguousarray(INPUTS["sample"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    others = {
        "sample": turned.astype(np.float64),
        "timestep": [250.5],
        "encoder_hidden_states": np.ones((1, 77, 32), np.int8),
    }
    out = unet.infer({**INPUTS, **others})["out_sample"]
    np.testing.assert_allclose(out, wanted, rtol=1e-6)


def test_a_scalar_input(tmp_path: Path) -> None:
    scale = parameter([], ov.Type.f32, "scale")
    x = parameter([2], ov.Type.f32, "x")
    save(finish(ops.multiply(x, scale), "y", [x, scale]), tmp_path, {})
    product = Component("product", tmp_path / "openvino_model.xml")
    out = product.infer({"x": np.ones(2, np.float32), "scale": np.float32(3)})
    np.testing.assert_array_equal(out["y"], [3, 3])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"sample": INPUTS["sample"]}, "which nothing gives"),
        ({**INPUTS, "guidance": INPUTS["sample"]}, "no input 'guidance'.*timestep"),
        ({**INPUTS, "sample": INPUTS["sample"][:, :3]}, r"sample of the shape \[1, 3, 8, 8\]"),
    ],
)
def test_wrong_inputs(inputs: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(SdvinoError, match=words) as caught:
        make(folder).infer(inputs)
    assert len(str(caught.value)) < 400


def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(DeviceError, match="TPU"):
        make(folder, device="TPU").load()


def test_a_graph_that_openvino_does_not_read(folder: Path, tmp_path: Path) -> None:
    xml = tmp_path / "openvino_model.xml"
    text = (folder / "unet" / "openvino_model.xml").read_text(encoding="utf-8")
    xml.write_text(text.replace('type="Convolution"', 'type="Convolutoin"'), encoding="utf-8")
    shutil.copy(folder / "unet" / "openvino_model.bin", tmp_path)
    with pytest.raises(ModelFolderError, match=r"graph of the unet.*Convolutoin") as caught:
        Component("unet", xml).load()
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_two_threads_at_once(folder: Path) -> None:
    unet = make(folder, num_streams=2)
    right: list[bool] = []

    def run(timestep: float) -> None:
        inputs = {**INPUTS, "timestep": np.array([timestep], np.float32)}
        wanted = expected(INPUTS["sample"], timestep)
        right.extend(
            np.allclose(unet.infer(inputs)["out_sample"], wanted, 1e-3, 1e-3) for _ in range(50)
        )

    threads = [threading.Thread(target=run, args=(t,)) for t in (0.0, 5000.0, 10000.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 150


def test_the_second_load_comes_from_the_cache(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (make(folder, cache_dir=tmp_path) for _ in range(2))
    assert not first.compiled.get_property("LOADED_FROM_CACHE")
    assert second.compiled.get_property("LOADED_FROM_CACHE")
    np.testing.assert_array_equal(
        first.infer(INPUTS)["out_sample"], second.infer(INPUTS)["out_sample"]
    )
    (blob,) = tmp_path.glob("*/*.blob")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    blob.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="sdvino"):
        third = make(folder, cache_dir=tmp_path)
        np.testing.assert_array_equal(
            third.infer(INPUTS)["out_sample"], first.infer(INPUTS)["out_sample"]
        )
    assert "damaged" in caplog.text
    assert make(folder, cache_dir=tmp_path).compiled.get_property("LOADED_FROM_CACHE")


@pytest.mark.parametrize("device", ["AUTO", "HETERO:CPU"])
def test_the_cache_of_virtual_devices(device: str, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        out = make(folder, cache_dir=tmp_path, device=device).infer(INPUTS)["out_sample"]
        np.testing.assert_allclose(out, expected(INPUTS["sample"], 250.5), rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.glob("*/*.blob"))) == 1


def scaled(factor: float) -> Callable[[ov.Model], None]:
    """An edit that changes a constant and nothing of the graph's form."""

    def edit(model: ov.Model) -> None:
        source = model.get_results()[0].input_value(0)
        node = ops.multiply(source, np.float32(factor))
        source.set_names(set())
        model.get_results()[0].input(0).replace_source_output(node.output(0))
        node.output(0).set_names({"sample"})
        model.validate_nodes_and_infer_types()

    return edit


def test_two_edits_of_one_graph_do_not_collide(folder: Path, tmp_path: Path) -> None:
    latents = INPUTS["sample"]
    xml = folder / "vae_decoder" / "openvino_model.xml"
    results = {}
    for again in (False, True):
        for factor in (1.0, 2.0, 3.0):
            settings = DeviceSettings(cache_dir=tmp_path)
            decoder = Component("vae_decoder", xml, settings, prepare=scaled(factor))
            out = decoder.infer({"latent_sample": latents})["sample"]
            assert decoder.compiled.get_property("LOADED_FROM_CACHE") == again
            results[factor] = out.copy()
            np.testing.assert_allclose(out, results[1.0] * factor, rtol=1e-5)
    assert len(list(tmp_path.glob("*/*.blob"))) == 3


def test_new_weights_under_an_old_name_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    settings = DeviceSettings(cache_dir=tmp_path / "cache")
    results = []
    for seed in (1, 2):
        x = parameter([1, 4, 8, 8], ov.Type.f32, "x")
        save(finish(convolution(x, 4, 3, seed=seed), "y", [x]), tmp_path / "net", {})
        net = Component("net", tmp_path / "net" / "openvino_model.xml", settings)
        results.append(net.infer({"x": INPUTS["sample"]})["y"].copy())
    assert not np.allclose(*results)


def test_no_cache_when_told(folder: Path, tmp_path: Path) -> None:
    make(folder, cache_dir=tmp_path, cache=False).load()
    assert list(tmp_path.iterdir()) == []


LONG_RUN = """
import sys
import numpy as np
from pathlib import Path
from sdvino.runtime.component import Component
net = Component("net", Path(sys.argv[1]))
net.load()
print("running", flush=True)
try:
    net.infer({"x": np.ones((1, 16, 512, 512), np.float32)})
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(0)
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone")
def test_ctrl_c_stops_a_run(tmp_path: Path) -> None:
    # Some 10 seconds of work, which the device can leave between any two of its nodes.
    x = parameter([1, 16, 512, 512], ov.Type.f32, "x")
    node = x
    for _ in range(600):
        node = convolution(node, 16, 16, seed=3)
    save(finish(node, "y", [x]), tmp_path, {})
    xml = str(tmp_path / "openvino_model.xml")
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_RUN, xml], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        out_text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert out_text == "stopped\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Exception from src/inference/src/cpp/core.cpp:92:\nCheck 'x' failed at src/a.cpp:3:\n"
            'Device with "TPU" name is not registered\n\n',
            'Device with "TPU" name is not registered',
        ),
        ("Check 'a == b' failed at src/core/x.cpp:12: the shapes differ.\n", "the shapes differ"),
        ("", "RuntimeError"),
        ("x" * 1000, "x" * 157 + "..."),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert short_reason(RuntimeError(text)) == reason


def test_the_graphs_of_these_tests() -> None:
    assert {name for port in unet().inputs for name in port.get_names()} == set(INPUTS)
    assert vae_decoder().outputs[0].get_names() == {"sample"}


@pytest.mark.parametrize("together", [False, True])
def test_each_run_of_several_keeps_its_own_outputs(folder: Path, together: bool) -> None:
    component = make(folder, num_streams=2 if together else 1)
    several = [{**INPUTS, "timestep": np.array([t], np.float32)} for t in (100.0, 200.0, 300.0)]
    results = component.infer_each(several, together=together)
    for given, result in zip(several, results, strict=True):
        wanted = expected(INPUTS["sample"], float(given["timestep"][0]))
        np.testing.assert_allclose(result["out_sample"], wanted, atol=1e-4)
    assert {"sample", "timestep"} <= set().union(*component.input_names)
    with pytest.raises(SdvinoError, match="which nothing gives"):
        component.infer_each([INPUTS, {"sample": INPUTS["sample"]}])
