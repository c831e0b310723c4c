"""The scratch folder of one input of the fuzzer, and damage to files as such.

A file is removed, emptied, or replaced by what no file is: a folder, a link to somewhere, a FIFO, a
socket, a terabyte of nothing. What stands in ``outside`` is no part of any input; a secret in it
must not come out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz_mutate import mutate

#: Stands in files outside of what a command was given, and nowhere else.
SECRET = "the-secret-that-stands-outside"
#: Ending of the name of a file that planted code makes.
CANARY = ".ran"
#: A module that leaves a word that it ran, where nothing tidies up, and ends what imported it.
PLANTED = (
    f'import os\nopen(os.environ["HOME"] + "/planted{CANARY}", "w").close()\nraise SystemExit(7)\n'
)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was done to an input."""

    file: str
    what: str
    #: Whether it is a regular file with other content than before.
    content: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(slots=True)
class Room:
    """What an input has to itself: the folders of a person in miniature."""

    path: Path
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in (self.cwd, self.home, self.cache, self.temporary, self.outside):
            folder.mkdir(parents=True)
        for name in ("secret.txt", "secret.json", "secret.toml"):
            (self.outside / name).write_bytes(with_secret(b"{}", name))

    @property
    def cwd(self) -> Path:
        """Where the command runs."""
        return self.path / "cwd"

    @property
    def home(self) -> Path:
        """HOME."""
        return self.path / "home"

    @property
    def cache(self) -> Path:
        """SDVINO_CACHE_DIR."""
        return self.path / "cache"

    @property
    def temporary(self) -> Path:
        """TMPDIR."""
        return self.path / "tmp"

    @property
    def outside(self) -> Path:
        """Files that no command was given."""
        return self.path / "outside"

    def environment(self) -> dict[str, str]:
        """Return the environment of a command."""
        return {
            "PATH": os.defpath,
            "HOME": str(self.home),
            "SDVINO_CACHE_DIR": str(self.cache),
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
            "LANG": "C.UTF-8",
        }

    def damage(self, rng: Random, files: Sequence[Path], *, content_only: bool = False) -> None:
        """Damage one of ``files``: its content, or, a quarter of the time, itself."""
        path = rng.choice(files)
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**30:
            return  # an earlier change made it none
        name = path.relative_to(self.path).as_posix()
        if not content_only and rng.random() < 0.25:
            what = rng.choice(tuple(FILE_CHANGES))
            FILE_CHANGES[what](self, path)
            self.changes.append(Change(name, what))
        else:
            before = path.read_bytes()
            after, what = mutate(rng, before, path.suffix)
            path.write_bytes(after)
            self.changes.append(Change(name, what, content=after != before))


def with_secret(content: bytes, name: str) -> bytes:
    """Return ``content`` as a file of this name would hold it with the secret in it."""
    if name.endswith(".json"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(content)
            if isinstance(value, dict):
                return json.dumps({**value, "token": SECRET, "_name_or_path": SECRET}).encode()
    form = {".xml": "\n<!-- {} -->\n", ".toml": '\nsummary = "{}"\n'}.get(
        Path(name).suffix, "\n{}\n"
    )
    return content + form.format(SECRET).encode()


def files_under(folder: Path) -> list[Path]:
    """Return the regular files of a folder, in an order that is always the same."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def remove(path: Path) -> None:
    """Remove a file or a tree, also one that nobody may read."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, folders, _ in os.walk(path):
        for name in folders:
            with contextlib.suppress(OSError):
                if not (Path(folder) / name).is_symlink():
                    (Path(folder) / name).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def make_fifo(path: Path) -> None:
    """Make a FIFO, which a reader waits on for ever."""
    if sys.platform != "win32":
        os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Make a socket that nobody listens on."""
    if sys.platform == "win32":
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # by way of the descriptor: the name of a socket may have 107 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _replaced(make: Callable[[Path], None]) -> Callable[[Room, Path], None]:
    def change(room: Room, path: Path) -> None:
        remove(path)
        make(path)

    return change


def _link_outside(room: Room, path: Path) -> None:
    """Move the file out and leave a link; it now says the secret too."""
    target = room.outside / path.name
    target.write_bytes(with_secret(path.read_bytes(), path.name))
    path.unlink()
    path.symlink_to(os.path.relpath(target, path.parent))


def _folder_outside(room: Room, path: Path) -> None:
    """Move the whole folder out, secrets added, and leave a link."""
    folder = path.parent
    if folder.parent == room.path or folder.is_symlink():  # never the working folder itself
        return _link_outside(room, path)
    target = room.outside / f"{folder.name}-folder"
    shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True)
    for file in files_under(target):
        if file.suffix in (".json", ".txt"):
            file.write_bytes(with_secret(file.read_bytes(), file.name))
    remove(folder)
    folder.symlink_to(os.path.relpath(target, folder.parent))
    return None


def _cut(room: Room, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _sparse(room: Room, path: Path) -> None:
    os.truncate(path, 2**40)


def _empty(room: Room, path: Path) -> None:
    os.truncate(path, 0)


def _odd_name(room: Room, path: Path) -> None:
    """Put a copy beside it whose name would write to a terminal, and is no UTF-8."""
    path.with_name(f"\x1b[2J\udcff{path.name[-200:]}").write_bytes(path.read_bytes())


def _unreadable(room: Room, path: Path) -> None:
    path.chmod(0)


#: Name -> what is done to a file.
FILE_CHANGES: Mapping[str, Callable[[Room, Path], None]] = {
    "removed": lambda room, path: remove(path),
    "emptied": _empty,
    "cut in half": _cut,
    "a terabyte of nothing": _sparse,
    "unreadable": _unreadable,
    "beside one of an odd name": _odd_name,
    "a folder": _replaced(lambda path: path.mkdir()),
    "a folder with a file": _replaced(lambda path: (path / "a" / "b").mkdir(parents=True)),
    "a FIFO": _replaced(make_fifo),
    "a socket": _replaced(make_socket),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _replaced(lambda path: path.symlink_to("nothing-there")),
    "a link to /dev/zero": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to its folder": _replaced(lambda path: path.symlink_to(".")),
    "a link outside": _link_outside,
    "its folder is a link outside": _folder_outside,
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return path -> (size, time of the last change) of everything in a folder but folders.

    Links are not followed; what cannot be looked at is left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where) / name
            with contextlib.suppress(OSError):
                status = path.lstat()
                size = status.st_size if stat.S_ISREG(status.st_mode) else -1
                found[path.relative_to(folder).as_posix()] = (size, status.st_mtime_ns)
    return found
