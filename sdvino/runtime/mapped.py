"""Weights that OpenVINO maps from a file: which of them are in memory, and how they leave it.

Reading a graph maps its weights. Compiling for a CPU reads each of them once, to fold and pack it,
and the pages that were read then stay beside the packed copy: as many bytes again, for as long as
the compiled model lives. They are clean pages of a file, so the process can drop them at any time;
whoever reads one again gets it from the system's cache of files, or from the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sdvino.runtime.topology import read_text

#: Bytes of mapped pages that may gather while a graph is compiled, and seconds between two looks.
GATHERED_BYTES = 48 * 10**6
_LOOK_SECONDS = 0.01
_MADV_DONTNEED = 4  # Linux


def mapped_ranges(
    paths: Sequence[Path], maps: str, *, writable: bool = False
) -> list[tuple[int, int]]:
    """Return where ``maps``, the text of /proc/self/maps, has the files: addresses and lengths.

    ``paths`` are files, and folders whose files all count. Only what nobody may write: dropping
    those pages loses nothing. With ``writable`` also what is mapped copy-on-write, for files whose
    copies nobody has written to.
    """
    ranges = []
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if len(words) < 6 or words[1][:2] not in ("r-", "rw" if writable else "r-"):
            continue
        file = Path(words[5])
        if any(path in (file, file.parent) for path in paths):
            first, _, end = words[0].partition("-")
            ranges.append((int(first, 16), int(end, 16) - int(first, 16)))
    return ranges


def drop_pages(paths: Sequence[Path], *, writable: bool = False) -> None:
    """Drop the pages of these files that this process has mapped; elsewhere than on Linux nothing.

    ``paths`` and ``writable`` are as for `mapped_ranges`.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    there = [path.resolve() for path in paths]
    maps = read_text("/proc/self/maps") or ""
    for address, length in mapped_ranges(there, maps, writable=writable):
        library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTNEED)


@contextmanager
def pages_dropped(paths: Sequence[Path], *, writable: bool = False) -> Iterator[None]:
    """Keep few pages of these files in memory while the block runs, and none after it.

    A thread looks and drops them. The block takes about as long as before: pages come back without
    the disk while the machine has memory to spare. ``paths`` and ``writable`` are as for
    `mapped_ranges`.
    """
    before = _file_pages()
    if not paths or before is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            now = _file_pages()
            if now is not None and now - before > GATHERED_BYTES:
                drop_pages(paths, writable=writable)

    looking = threading.Thread(target=look, name="sdvino-pages", daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()
        drop_pages(paths, writable=writable)


def _file_pages() -> int | None:
    """Return the bytes of files that this process has in memory; None where no one says."""
    words = (read_text("/proc/self/statm") or "").split()
    if len(words) < 3 or not words[2].isdigit():
        return None
    return int(words[2]) * mmap.PAGESIZE
