"""Compiled models known by their files and edits: the second time, no graph is read."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph import edit as edits
from sdvino.graph.edit import Edit
from sdvino.graph.walk import reshape_static
from sdvino.inputs.files import sha256_of
from sdvino.runtime import compiling
from sdvino.runtime.cache import _write_checksums
from sdvino.runtime.compiling import key_of_files
from sdvino.runtime.component import Component
from sdvino.runtime.properties import DeviceFacts
from sdvino.runtime.topology import CpuReport
from sdvino.settings import DeviceSettings
from tests.tiny_folder import finish, parameter, save


def facts(**cpu: Any) -> DeviceFacts:
    report = CpuReport(performance_cores=2, **{"vendor": "Maker", **cpu})
    return DeviceFacts(supported=frozenset(), capabilities=frozenset({"FP32"}), cpu=report)


CPU = {"CPU": facts()}
ROWS, WIDTH = 50_000, 16


def table(path: Path, seed: int = 0) -> Path:
    """Save a graph that looks rows of a table up, as a text encoder does; return its XML."""
    rows = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    ids = parameter([-1, -1], ov.Type.i64, "ids")
    found = ops.gather(ops.constant(rows), ids, np.int64(0))
    # Added in the graph, the numbers are no longer those of the file: they are in the blob.
    save(finish(ops.add(found, np.float32(1)), "states", [ids]), path, {})
    return path / "openvino_model.xml"


def fixed(length: int) -> Edit:
    return Edit.of(reshape_static, shapes={"ids": [1, length]})


def component(xml: Path, cache: Path, edit: Any, **settings: Any) -> Component:
    return Component("text_encoder", xml, DeviceSettings(cache_dir=cache, **settings), prepare=edit)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every graph that a component reads from its files."""
    seen: list[Path] = []
    read = Component._read

    def noted(self: Component, core: ov.Core) -> ov.Model:
        seen.append(self.xml_path)
        return read(self, core)

    monkeypatch.setattr(Component, "_read", noted)
    return seen


def looked_up(made: Component, length: int) -> Any:
    ids = np.linspace(0, ROWS - 1, length).astype(np.int64)[None]
    return made.infer({"ids": ids})["states"].copy()


def test_the_second_load_reads_no_graph(tmp_path: Path, reads: list[Path]) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    results = [looked_up(component(xml, cache, fixed(7)), 7) for _ in range(3)]
    assert reads == [xml]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    (entry,) = cache.iterdir()
    assert sorted(file.suffix for file in entry.iterdir()) == [".blob", ".json"]


def test_the_graph_is_edited_while_its_pages_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that looks at all weights would otherwise hold as many bytes of the file."""
    xml, within, during = table(tmp_path / "net"), [0], []

    @contextmanager
    def dropping(paths: object) -> Iterator[None]:
        within[0] += 1
        yield
        within[0] -= 1

    read = Component._read

    def noted(self: Component, core: ov.Core) -> ov.Model:
        during.append(within[0])
        return read(self, core)

    monkeypatch.setattr(compiling, "pages_dropped", dropping)
    monkeypatch.setattr(Component, "_read", noted)
    for cache in (True, False):
        settings = DeviceSettings(cache=cache, cache_dir=tmp_path / "cache")
        Component("text_encoder", xml, settings, prepare=fixed(7)).load()
    assert during == [1, 1]


def test_another_edit_and_other_files_are_other_entries(tmp_path: Path, reads: list[Path]) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    assert looked_up(component(xml, cache, fixed(7)), 7).shape == (1, 7, WIDTH)
    assert looked_up(component(xml, cache, fixed(9)), 9).shape == (1, 9, WIDTH)
    before = looked_up(component(xml, cache, fixed(7)), 7)
    assert len(reads) == 2
    table(tmp_path / "net", seed=1)
    assert not np.array_equal(looked_up(component(xml, cache, fixed(7)), 7), before)
    looked_up(component(xml, cache, fixed(7), num_streams=2), 7)
    assert len(reads) == 4


def test_other_code_of_ours_is_another_entry(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    component(xml, cache, fixed(7)).load()
    monkeypatch.setattr(edits, "code_digest", lambda module: "of another version")
    component(xml, cache, fixed(7)).load()
    assert len(reads) == 2


@pytest.mark.parametrize("device", ["AUTO", "HETERO:CPU"])
def test_devices_that_choose_have_a_cache_too(
    device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    expected = looked_up(component(xml, cache, fixed(7)), 7)
    with caplog.at_level(logging.INFO, logger="sdvino"):
        for _ in range(2):
            found = looked_up(component(xml, cache, fixed(7), device=device), 7)
            np.testing.assert_array_equal(found, expected)
    assert not caplog.records
    assert len(list(cache.glob("*/*.blob"))) == 2


def test_an_edit_that_says_nothing_is_made_every_time(tmp_path: Path, reads: list[Path]) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    for _ in range(2):
        silent = component(xml, cache, lambda model: reshape_static(model, {"ids": [1, 7]}))
        assert looked_up(silent, 7).shape == (1, 7, WIDTH)
    assert len(reads) == 2
    assert silent.compiled.get_property("LOADED_FROM_CACHE")  # OpenVINO's own hash found it


def test_what_cannot_be_imported_is_read_by_openvino_itself(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    expected = looked_up(component(xml, cache, fixed(7)), 7)
    fails = [True]

    def import_model(self: Any, *arguments: Any) -> Any:
        if fails.pop():
            raise RuntimeError("made by another version")
        raise AssertionError

    monkeypatch.setattr(ov.Core, "import_model", import_model)
    again = component(xml, cache, fixed(7))
    np.testing.assert_array_equal(looked_up(again, 7), expected)
    assert again.compiled.get_property("LOADED_FROM_CACHE")
    assert len(reads) == 2


@pytest.mark.parametrize(
    "header", [b"", b"RR_UPCVO", b'<?xml header_size_alignment="64"/>\n', b"<?xml"]
)
def test_a_blob_of_another_form_is_left_to_openvino(
    header: bytes, tmp_path: Path, reads: list[Path]
) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    expected = looked_up(component(xml, cache, fixed(7)), 7)
    blob = next(cache.glob("*/*.blob"))
    blob.write_bytes(header and header + blob.read_bytes().partition(b"\n")[2])
    _write_checksums(blob.parent)  # as if it had been written so
    for _ in range(2):  # OpenVINO finds it wrong and writes it again
        np.testing.assert_array_equal(looked_up(component(xml, cache, fixed(7)), 7), expected)
    assert len(reads) == 2


def test_what_was_imported_outlives_its_file(tmp_path: Path) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    expected = looked_up(component(xml, cache, fixed(7)), 7)
    imported = component(xml, cache, fixed(7))
    imported.load()
    gc.collect()
    if os.name == "posix":  # elsewhere a file in use stays
        next(cache.glob("*/*.blob")).unlink()
    for _ in range(3):
        np.testing.assert_array_equal(looked_up(imported, 7), expected)


def test_unloading_while_another_thread_runs(tmp_path: Path) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    expected = looked_up(component(xml, cache, fixed(7)), 7)
    shared = component(xml, cache, fixed(7))
    right: list[bool] = []

    def work() -> None:
        right.extend(np.array_equal(looked_up(shared, 7), expected) for _ in range(100))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        shared.unload()
    for thread in threads:
        thread.join()
    assert right == [True] * 200


KEYS: dict[str, Callable[[Path], object]] = {
    "a function that is no edit": lambda xml: key(xml, reshape_static),
    "another device": lambda xml: key(xml, None, device="GPU.0"),
    "a device that chooses": lambda xml: key(xml, None, device="AUTO"),
}


def key(xml: Path, edit: Any, devices: Any = CPU, device: str = "CPU") -> str | None:
    properties = {"NUM_STREAMS": 1}
    files = [sha256_of(path) for path in (xml, xml.with_suffix(".bin"))]
    changes = [] if edit is None else [edit]
    return key_of_files(files, changes, device, properties, devices)


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_no_key_for(make: Callable[[Path], object], tmp_path: Path) -> None:
    assert make(table(tmp_path)) is None


def test_another_processor_is_another_key(tmp_path: Path) -> None:
    xml = table(tmp_path)

    def on(**cpu: Any) -> str | None:
        return key(xml, None, {"CPU": facts(**{"flags": frozenset({"avx2", "fma"}), **cpu})})

    others = {on(), on(vendor="Other"), on(flags=frozenset({"avx2"})), on(limited=True)}
    assert len(others) == 4
    assert on(threads=8) == on()  # how many threads is said by the properties


SCRIPT = """
import sys
from pathlib import Path
from tests.runtime.test_compiling import fixed, key
print(key(Path(sys.argv[1]), fixed(7)))
"""


def test_every_process_has_the_same_key(tmp_path: Path) -> None:
    xml = table(tmp_path)
    keys = {key(xml, fixed(7)) or ""}
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(xml)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        keys.add(run.stdout.strip())
    assert len(keys) == 1


def test_other_weights_of_the_same_size_and_time_are_another_model(tmp_path: Path) -> None:
    first, second = table(tmp_path / "net"), table(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    for xml in (first, second):
        for path in (xml, xml.with_suffix(".bin")):
            os.utime(path, ns=(1, 1))
    old = looked_up(component(first, cache, fixed(7)), 7)
    new = looked_up(component(second, tmp_path / "cache 2", fixed(7)), 7)
    for suffix in (".xml", ".bin"):
        assert first.with_suffix(suffix).stat().st_size == second.with_suffix(suffix).stat().st_size
        second.with_suffix(suffix).replace(first.with_suffix(suffix))
    found = looked_up(component(first, cache, fixed(7)), 7)
    np.testing.assert_array_equal(found, new)
    assert not np.array_equal(found, old)


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path, reads: list[Path]) -> None:
    xml, cache = table(tmp_path / "net"), tmp_path / "cache"
    before = looked_up(component(xml, cache, fixed(7)), 7)
    moved = tmp_path / "moved" / xml.name
    moved.parent.mkdir()
    for suffix in (".xml", ".bin"):
        xml.with_suffix(suffix).replace(moved.with_suffix(suffix))
    np.testing.assert_array_equal(looked_up(component(moved, cache, fixed(7)), 7), before)
    assert reads == [xml]


def test_files_that_are_not_those_expected_are_refused(tmp_path: Path) -> None:
    xml = table(tmp_path / "net")
    sums = {path.name: sha256_of(path) for path in (xml, xml.with_suffix(".bin"))}
    for cache in (True, False):
        settings = DeviceSettings(cache=cache, cache_dir=tmp_path / "cache")
        Component("text_encoder", xml, settings, prepare=fixed(7), sha256=sums).load()
        for name in sums:
            wrong = {**sums, name: "0" * 64}
            refused = Component("text_encoder", xml, settings, prepare=fixed(7), sha256=wrong)
            with pytest.raises(ModelFolderError, match=name):
                refused.load()
