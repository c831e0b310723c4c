from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdvino.inputs.files import FileLock
from sdvino.runtime.cache import CompiledCache, cache_key, default_cache_dir


class Compiler:
    """Writes a blob where there is none, as OpenVINO does with CACHE_DIR."""

    def __init__(self, size: int = 100) -> None:
        self.size = size
        self.compiled = 0
        self.read = 0

    def __call__(self, folder: Path | None) -> bytes:
        if folder is not None and (folder / "1.blob").exists():
            self.read += 1
            return (folder / "1.blob").read_bytes()
        self.compiled += 1
        content = b"x" * self.size
        if folder is not None:
            (folder / "1.blob").write_bytes(content)
        return content


def make(root: Path, limit: int = 10**6) -> CompiledCache:
    return CompiledCache(root, limit)


def test_the_second_time_reads(tmp_path: Path) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert make(tmp_path).compile("key", compiler) == b"x" * 100
    assert (compiler.compiled, compiler.read) == (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda blob: os.truncate(blob, 10),
        lambda blob: blob.write_bytes(b""),
        lambda blob: blob.with_name("2.blob").write_bytes(b"another"),
        lambda blob: blob.with_name("checksums.json").unlink(),
        lambda blob: blob.with_name("checksums.json").write_text("{"),
    ],
)
def test_a_damaged_blob_is_never_read(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Compiler()
    make(tmp_path).compile("key", compiler)
    damage(tmp_path / "key" / "1.blob")
    with caplog.at_level(logging.WARNING, logger="sdvino"):
        assert make(tmp_path).compile("key", compiler) == b"x" * 100
    assert "damaged" in caplog.text
    assert (compiler.compiled, compiler.read) == (2, 0)
    make(tmp_path).compile("key", compiler)
    assert compiler.read == 1


def test_a_blob_that_cannot_be_used_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path).compile("key", Compiler())
    compiler = Compiler()

    def refuse_old(folder: Path | None) -> bytes:
        if folder is not None and (folder / "1.blob").exists():
            raise RuntimeError("another driver")
        return compiler(folder)

    with caplog.at_level(logging.WARNING, logger="sdvino"):
        make(tmp_path).compile("key", refuse_old)
    assert compiler.compiled == 1
    assert "compiling it again" in caplog.text


def test_what_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path | None) -> bytes:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        make(tmp_path).compile("key", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_blob_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path) -> None:
    def full_disk(folder: Path | None) -> bytes:
        if folder is not None:
            (folder / "1.blob").write_bytes(b"half")
            raise RuntimeError("no space left on device")
        return b"compiled"

    assert make(tmp_path).compile("key", full_disk) == b"compiled"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = Compiler()
    assert make(tmp_path / "file" / "cache").compile("key", compiler) == b"x" * 100


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = make(tmp_path, limit=1000)
    for number, key in enumerate(("old", "used", "older")):
        cache.compile(key, Compiler(300))
        os.utime(tmp_path / key / "checksums.json", (number, number))
    os.utime(tmp_path / "older" / "checksums.json", (0, 0))
    cache.compile("used", Compiler(300))  # now the most recent
    cache.compile("new", Compiler(300))
    assert {path.name for path in tmp_path.iterdir()} == {"used", "new"}


def test_a_blob_over_the_limit_stays_until_the_next(tmp_path: Path) -> None:
    cache = make(tmp_path, limit=0)
    cache.compile("a", Compiler(300))
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    cache.compile("b", Compiler(300))
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_what_a_crash_left_goes_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".writing-old", tmp_path / ".writing-fresh"
    old.mkdir()
    fresh.mkdir()
    then = time.time() - 2 * 86400
    os.utime(old, (then, then))
    make(tmp_path).trim()
    assert {path.name for path in tmp_path.iterdir()} == {".writing-fresh"}


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("x" * 1000)
    make(tmp_path, limit=0).trim()
    assert (tmp_path / "notes" / "text").exists()


def test_two_at_once(tmp_path: Path) -> None:
    both = threading.Barrier(2)
    compilers = [Compiler(), Compiler()]

    def run(compiler: Compiler) -> None:
        def together(folder: Path | None) -> bytes:
            result = compiler(folder)
            both.wait(10)
            return result

        make(tmp_path).compile("key", together)

    threads = [threading.Thread(target=run, args=(compiler,)) for compiler in compilers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [compiler.compiled for compiler in compilers] == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    third = Compiler()
    make(tmp_path).compile("key", third)
    assert third.read == 1


def test_keys() -> None:
    keys = [cache_key("a", "b"), cache_key("ab"), cache_key("b", "a"), cache_key("a", 1)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key("a", "b")


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {}, "home/.cache/sdvino"),
        ("linux", {"XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/sdvino"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/sdvino"),
        ("darwin", {}, "home/Library/Caches/sdvino"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/sdvino/Cache"),
        ("win32", {}, "home/AppData/Local/sdvino/Cache"),
        ("linux", {"SDVINO_CACHE_DIR": "own", "XDG_CACHE_HOME": "/var/xdg"}, "own"),
    ],
)
def test_where_it_lies(platform: str, environ: dict[str, str], expected: str) -> None:
    assert default_cache_dir(platform, environ, Path("home")) == Path(expected)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_what_others_may_write_is_not_read(tmp_path: Path) -> None:
    compiler = Compiler()
    make(tmp_path).compile("key", compiler)
    (tmp_path / "key").chmod(0o777)
    for _ in range(2):
        assert make(tmp_path).compile("key", compiler) == b"x" * 100
    assert (compiler.compiled, compiler.read) == (3, 0)
    assert (tmp_path / "key").is_dir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "checksums.json").write_text("[" * 100_000),
        lambda entry: (entry / "checksums.json").rename(entry / "2.blob"),
        lambda entry: entry.rename(entry.with_name("a")).joinpath("1.blob").rename(entry),
        lambda entry: (entry / "1.blob").chmod(0),
    ],
)
def test_a_damaged_entry_costs_one_compilation(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    compiler = Compiler()
    make(tmp_path).compile("key", compiler)
    damage(tmp_path / "key")
    for _ in range(3):
        assert make(tmp_path).compile("key", compiler) == b"x" * 100
    assert compiler.compiled <= 2


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from sdvino.runtime.cache import CompiledCache\n"
        "write = lambda folder: ((folder / '1.blob').write_text('half'), os._exit(9))\n"
        "CompiledCache(Path(sys.argv[1]), 10**6).compile('key', write)"
    )
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=root)
    assert killed.returncode == 9
    (left,) = tmp_path.iterdir()
    living = tmp_path / f"{left.name}-2"
    shutil.copytree(left, living)
    lock = FileLock(living / ".lock")
    assert lock.acquire(wait=False)
    for folder in (left, living):
        os.utime(folder, (1, 1))
    make(tmp_path).compile("key", Compiler())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "key"])
    lock.release()


def test_a_lower_limit_counts_from_the_next_start_on(tmp_path: Path) -> None:
    for number in range(3):
        make(tmp_path).compile(f"key {number}", Compiler(size=1000))
        os.utime(tmp_path / f"key {number}" / "checksums.json", (number, number))
    make(tmp_path, limit=1500).compile("key 2", Compiler(size=1000))
    assert [path.name for path in tmp_path.iterdir()] == ["key 2"]
