from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.runtime.memory import (
    MemoryStatus,
    check_memory,
    decoder_bytes,
    held_bytes,
    linux_status,
    memory_status,
    unet_bytes,
)
from tests.tiny_folder import edit_json, make_tiny_folder

GB = 10**9
MEMINFO = {
    "/proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n",
    "/proc/self/statm": "9000 5000 100 1 0 7000 0\n",
}
KB = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder.open(make_tiny_folder(tmp_path_factory.mktemp("model") / "model"))


def test_a_larger_picture_needs_more(folder: ModelFolder) -> None:
    for measure in (unet_bytes, decoder_bytes):
        sizes = [measure(folder, side, side) for side in (64, 512, 1024, 4096)]
        assert sizes == sorted(set(sizes))
        assert sizes[0] < GB
    whole = decoder_bytes(folder, 1024, 1024)
    assert decoder_bytes(folder, 1024, 1024, 512) < whole


def test_attention_over_every_latent_needs_most(tmp_path: Path) -> None:
    path = make_tiny_folder(tmp_path)
    (path / "sdvino.json").unlink()  # which says how long the configuration is
    needed = []
    for kinds in (["DownBlock2D"] * 2, ["DownBlock2D", "AttnDownBlock2D"], ["AttnDownBlock2D"]):
        edit_json(path / "unet" / "config.json", down_block_types=kinds)
        needed.append(unet_bytes(ModelFolder.open(path), 4096, 4096))
    assert needed == sorted(set(needed))
    assert needed[-1] > (4096 // 8) ** 4 * 4


def test_the_weights_count(folder: ModelFolder) -> None:
    part = folder.components["unet"]
    weights = part.bin.stat().st_size
    assert held_bytes(folder, "unet") > weights
    assert held_bytes(folder, "unet", "no such part") == held_bytes(folder, "unet")
    assert held_bytes(folder, *folder.components) > held_bytes(folder, "unet")


def test_what_the_cpu_folds_is_held_twice(folder: ModelFolder) -> None:
    def held(kind: str, *, convolution: bool, quantized: bool) -> int:
        part = folder.components["unet"]
        ir = replace(part.ir, weights={(kind, convolution): 10**6}, quantized=quantized)
        parts = {"unet": replace(part, ir=ir)}
        return held_bytes(replace(folder, components=parts), "unet")

    packed = held("i8", convolution=True, quantized=True)
    assert packed == held("f32", convolution=True, quantized=False)
    assert packed == held("u8", convolution=False, quantized=False)
    assert 3 * packed < held("f16", convolution=False, quantized=True)
    assert 6 * packed < held("u8", convolution=True, quantized=False)


def test_an_absurd_size_is_refused(folder: ModelFolder) -> None:
    needed = unet_bytes(folder, 10**7, 10**7)
    with pytest.raises(RequestError, match=r"memory.*smaller"):
        check_memory(needed)
    check_memory(unet_bytes(folder, 64, 64))


def test_what_the_process_holds_is_not_counted_twice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdvino"):
        check_memory(6 * GB, MemoryStatus(8 * GB, 2 * GB, own=5 * GB))
        assert not caplog.records
        check_memory(6 * GB, MemoryStatus(8 * GB, 2 * GB, own=1 * GB))
    assert "close other programs" in caplog.text


def test_an_unknown_memory_refuses_nothing() -> None:
    check_memory(10**18, MemoryStatus(None, None))


def test_linux_on_a_laptop() -> None:
    status = linux_status(MEMINFO)
    assert (status.total, status.available) == (16000000 * KB, 8000000 * KB)
    assert status.own >= 5000 * 4096


def test_a_container_with_a_limit() -> None:
    files = {
        **MEMINFO,
        "/sys/fs/cgroup/memory.max": "4000000000\n",
        "/sys/fs/cgroup/memory.current": "3000000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\nfile 5\ninactive_file 1500000000\n",
    }
    status = linux_status(files)
    assert (status.total, status.available) == (4 * GB, 2.5 * GB)
    old = {
        **MEMINFO,
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000000\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "5000000000\n",
    }
    assert (linux_status(old).total, linux_status(old).available) == (4 * GB, 0)


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", ""])
def test_a_container_without_a_limit(limit: str) -> None:
    assert linux_status({**MEMINFO, "/sys/fs/cgroup/memory.max": limit}) == linux_status(MEMINFO)


@given(st.dictionaries(st.sampled_from(sorted(MEMINFO)), st.text(max_size=40)))
def test_whatever_linux_says(files: dict[str, str]) -> None:
    assert linux_status(files).own >= 0


def test_this_machine() -> None:
    status = memory_status()
    assert status.total is not None
    assert status.total > 10**8
    assert status.available is None or 0 < status.available <= status.total
    assert Path(__file__).stat().st_size < status.own < status.total
