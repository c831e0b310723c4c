from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.runtime import mapped
from sdvino.runtime.component import Component
from sdvino.runtime.mapped import drop_pages, mapped_ranges, pages_dropped
from sdvino.settings import DeviceSettings

MB = 10**6
MAPS = """\
7f0000000000-7f0000002000 r--p 00000000 fe:00 12  /models/my unet/openvino_model.bin
7f0000002000-7f0000003000 rw-p 00002000 fe:00 12  /models/my unet/openvino_model.bin
7f0000004000-7f0000005000 r--s 00000000 fe:00 13  /cache/0a/1.blob
7f0000006000-7f0000007000 r-xp 00000000 fe:00 14  /lib/libc.so
7f0000008000-7f0000009000 r--p 00000000 00:00 0
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident(path: Path) -> int:
    """Return the bytes of the file ``path`` that this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_ranges_are_those_of_the_files_that_nobody_writes() -> None:
    weights, cache = Path("/models/my unet/openvino_model.bin"), Path("/cache/0a")
    assert mapped_ranges([weights], MAPS) == [(0x7F0000000000, 0x2000)]
    assert mapped_ranges([weights, cache], MAPS)[1:] == [(0x7F0000004000, 0x1000)]
    assert mapped_ranges([Path("/cache")], MAPS) == []
    assert mapped_ranges([], MAPS) == []


@linux
def test_dropped_pages_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    values = np.arange(2 * MB, dtype=np.uint32)
    values.tofile(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) >= 0
        assert resident(path) >= 8 * MB
        drop_pages([path])
        assert resident(path) == 0
        assert pages[:] == values.tobytes()
        drop_pages([tmp_path])
        assert resident(path) == 0


@linux
@pytest.mark.slow
def test_pages_do_not_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "GATHERED_BYTES", 8 * MB)
    path = tmp_path / "weights.bin"
    np.zeros(64 * MB, np.uint8).tofile(path)
    most = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with pages_dropped([path]):
            for start in range(0, 64 * MB, MB):
                assert not any(pages[start : start + MB : mmap.PAGESIZE])
                time.sleep(0.005)
                most = max(most, resident(path))
        assert most < 48 * MB
        assert resident(path) == 0


def quantized_convolutions(folder: Path, count: int = 3, channels: int = 256) -> Path:
    """Save a graph of ``count`` convolutions with weights and activations in 8 bits."""
    rng = np.random.default_rng(0)
    limits = [ops.constant(np.float32(value)) for value in (-4.0, 4.0, -4.0, 4.0)]
    x = start = ops.parameter([1, channels, 8, 8], np.float32, name="x")
    for _ in range(count):
        numbers = rng.integers(-127, 128, (channels, channels, 3, 3), np.int8)
        scales = np.full((channels, 1, 1, 1), 1e-3, np.float32)
        weights = ops.multiply(ops.convert(ops.constant(numbers), "f32"), ops.constant(scales))
        rounded = ops.fake_quantize(x, *limits, 256)
        x = ops.convolution(rounded, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    xml = folder / "openvino_model.xml"
    ov.save_model(ov.Model([ops.result(x)], [start], "convolutions"), xml, compress_to_fp16=False)
    return xml


@linux
def test_a_loaded_graph_holds_one_copy_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "GATHERED_BYTES", MB // 4)
    xml = quantized_convolutions(tmp_path)
    weights = xml.with_suffix(".bin")
    x = np.random.default_rng(1).standard_normal((1, 256, 8, 8), dtype=np.float32)
    core = ov.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    plain = core.compile_model(core.read_model(xml), "CPU", options)
    (expected,) = plain(x).values()
    assert resident(weights) >= weights.stat().st_size * 0.9  # what this is about
    del plain

    cache = tmp_path / "cache"
    settings = DeviceSettings(cache_dir=cache, precision="f32")
    for _ in range(2):  # compiled, then from the cache
        component = Component("unet", xml, settings)
        component.load()
        assert resident(weights) == 0
        (got,) = {id(value): value for value in component.infer({"x": x}).values()}.values()
        np.testing.assert_array_equal(got, expected)
        assert resident(weights) < weights.stat().st_size // 10
        component.unload()
    (blob,) = cache.glob("*/*.blob")
    assert blob.stat().st_size < weights.stat().st_size // 10


def test_a_kept_graph_is_edited_once(tmp_path: Path) -> None:
    xml = quantized_convolutions(tmp_path, 1, 16)
    edits: list[Any] = []
    settings = DeviceSettings(cache_dir=tmp_path / "cache")
    x = np.ones((1, 16, 8, 8), np.float32)
    results = []
    for keep in (False, True):
        component = Component("unet", xml, settings, prepare=edits.append, keep_graph=keep)
        for _ in range(2):
            results.append(next(iter(component.infer({"x": x}).values())).copy())
            component.unload()
    assert len(edits) == 3
    for result in results:
        np.testing.assert_array_equal(result, results[0])
