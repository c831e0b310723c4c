from __future__ import annotations

import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdvino.errors import OutputError, RequestError
from sdvino.image.files import choose_path, output_error, write_new


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_never_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "circle.png"
    written = [write_new(target, bytes([i])) for i in range(3)]
    assert [path.name for path in written] == ["circle.png", "circle-2.png", "circle-3.png"]
    assert [path.read_bytes() for path in written] == [b"\0", b"\1", b"\2"]
    assert write_new(target, b"new", overwrite=True) == target
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["circle-2.png", "circle-3.png", "circle.png"]


def test_a_number_in_the_name_is_the_first_that_is_free(tmp_path: Path) -> None:
    (tmp_path / "name-002.png").write_bytes(b"")
    for overwrite in (False, True):
        chosen = choose_path(tmp_path / "name-%03d.png", overwrite=overwrite)
        assert chosen.name == "name-001.png"
    pattern = tmp_path / "name-%03d.png"
    assert [write_new(pattern, b"", overwrite=True).name for _ in range(2)] == [
        "name-001.png",
        "name-003.png",
    ]
    assert choose_path(tmp_path / "%d.png").name == "1.png"


@pytest.mark.parametrize("name", ["100%.png", "%s.png", "%d-%d.png", "%%d.png", "a\0.png"])
def test_other_patterns_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="name"):
        write_new(tmp_path / name, b"")
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    assert write_new(tmp_path / "a.png", b"").name == "a-2.png"
    assert not (tmp_path / "nowhere").exists()


def test_many_at_once_get_a_name_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: write_new(tmp_path / "a.png", bytes([i])), range(24)))
    assert len(set(written)) == 24
    assert sorted(path.read_bytes()[0] for path in written) == list(range(24))
    assert len(names(tmp_path)) == 24


@pytest.mark.skipif(sys.platform == "win32", reason="hard links work on NTFS")
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object, **_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    written = [write_new(tmp_path / "a.png", bytes([i])) for i in range(2)]
    assert [path.read_bytes() for path in written] == [b"\0", b"\1"]
    assert names(tmp_path) == ["a-2.png", "a.png"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files without names")
def test_what_is_being_written_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(names(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"old")
    write_new(tmp_path / "a.png", b"new", overwrite=True)
    write_new(tmp_path / "b.png", b"new")
    assert seen == [["a.png"], ["a.png"]]
    assert (tmp_path / "a.png").read_bytes() == b"new"


if sys.platform != "win32":  # which has no such limit
    import resource

    def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            for overwrite in (False, True):
                with pytest.raises(OutputError, match="cannot be written"):
                    write_new(tmp_path / "a.png", b"\0" * 200_000, overwrite=overwrite)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == b"old"


def test_reasons_say_what_to_do(tmp_path: Path) -> None:
    def reason(number: int) -> str:
        return str(output_error(tmp_path / "a.png", OSError(number, os.strerror(number))))

    assert "full" in reason(errno.ENOSPC)
    assert "create it" in reason(errno.ENOENT)
    assert "may write to" in reason(errno.EACCES)
    assert "may write to" in reason(errno.EROFS)
    assert "another name" in reason(errno.ENAMETOOLONG)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not there"):
        write_new(tmp_path / "none" / "a.png", b"")
    with pytest.raises(OutputError, match="another name"):
        write_new(tmp_path / ("a" * 400 + ".png"), b"")
    assert names(tmp_path) == []
