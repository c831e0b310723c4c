from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdvino.errors import ModelFolderError, RequestError
from sdvino.inputs.digests import digest_of
from sdvino.inputs.files import (
    MAX_BYTES,
    check_all_inside,
    check_inside,
    is_private,
    open_file,
    read_bytes,
    read_json,
    read_prompts,
    read_text,
    replace_file,
    sha256_of,
    user_path,
)

if sys.platform == "win32":
    pytest.skip("files of POSIX", allow_module_level=True)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (fifo, "no ordinary file"),
    "a socket": (unix_socket, "no ordinary file"),
    "a device": (device, "no ordinary file"),
    "a folder": (Path.mkdir, "is a folder"),
    "a loop of links": (loop, "cannot be read"),
    "nothing": (lambda path: None, "missing"),
    "too much": (lambda path: path.write_bytes(b"x" * 11), "over 10 bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_only_regular_files_within_the_limit_are_read(name: str, tmp_path: Path) -> None:
    make, words = ODD[name]
    path = tmp_path / "f"
    make(path)
    with pytest.raises(RequestError, match=words) as caught:
        read_bytes(path, limit=10, error=RequestError)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_file_without_a_size_is_bounded_while_it_is_read() -> None:
    with pytest.raises(ModelFolderError, match="over 10 bytes"):
        read_bytes(Path("/proc/self/maps"), limit=10)


def test_a_name_with_a_zero_byte_is_no_traceback() -> None:
    with pytest.raises(ModelFolderError):
        open_file(Path("a\0b"))
    with pytest.raises(RequestError):
        user_path("a\0b")


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text(path, limit=99) == '{"a": 1}'
    assert read_json(path, "a.json") == {"a": 1}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFolderError, match="UTF-8"):
        read_text(path, limit=99)
    path.write_bytes(b"[1]")
    with pytest.raises(RequestError, match="does not hold a JSON object"):
        read_json(path, "a.json")


def test_links_must_stay_in_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "secret"
    (folder / "unet").mkdir(parents=True)
    outside.write_text("secret")
    (folder / "real").write_text("x")
    (folder / "unet" / "inside").symlink_to("../real")
    check_all_inside(folder)
    (folder / "unet" / "loop").symlink_to("loop")
    check_all_inside(folder)  # it is nowhere, which reading it says
    link = folder / "unet" / "outside"
    link.symlink_to(outside)
    with pytest.raises(ModelFolderError, match="unet/outside is a link"):
        check_inside(link, folder)
    with pytest.raises(ModelFolderError, match="unet/outside is a link"):
        check_all_inside(folder)


def test_the_hubs_own_links_are_allowed_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("x")
    (snapshot / "f").symlink_to("../../blobs/1")
    check_inside(snapshot / "f", snapshot)
    (repository / "blobs" / "1").unlink()
    (repository / "blobs").rmdir()
    (tmp_path / "1").write_text("secret")
    (repository / "blobs").symlink_to(tmp_path)
    with pytest.raises(ModelFolderError, match="link"):
        check_inside(snapshot / "f", snapshot)


def test_what_others_may_write_is_not_private(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    assert is_private(folder)
    for mode in (0o720, 0o702, 0o777):
        folder.chmod(mode)
        assert not is_private(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    assert not is_private(tmp_path / "link")


def test_a_replaced_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in ("one", b"two"):
        replace_file(path, content)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known = tmp_path / "weights", tmp_path / "known"
    path.write_bytes(b"old")
    now = time.time()
    assert digest_of(path, known) == sha256_of(path)
    assert not known.exists()  # it may change within the clock's tick
    monkeypatch.setattr(time, "time", lambda: now + 60)
    os.utime(path, ns=(1, 1))
    digest = digest_of(path, known)
    (entry,) = known.iterdir()
    assert entry.read_text() == digest
    path.write_bytes(b"new")  # of the same size, and then of the same time
    os.utime(path, ns=(1, 1))
    assert digest_of(path, known) == sha256_of(path) != digest
    entry.write_text("rubbish")  # another process finds it
    digest_of.__globals__["_digest"].cache_clear()
    assert digest_of(path, known) == sha256_of(path)


def test_home_folders_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="home folder"):
        user_path("~nosuchuser/x")
    assert user_path("x" * 100) == Path("x" * 100)
    with pytest.raises(RequestError, match="no name that a file can have"):
        user_path("x" * 5000)


def test_a_list_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n# remark\n  two\u2028half \nthree".encode())
    assert read_prompts(path) == ("one", "two\u2028half", "three")
    path.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(RequestError, match="over 4 MB"):
        read_prompts(path)
