"""Memory of a process and all its descendants, read from /proc: Linux only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdvino.runtime.memory import linux_peak


def has_proc() -> bool:
    """Return whether this system tells the memory of other processes in /proc."""
    return Path("/proc/self/status").exists()


def tree(root: int) -> Iterator[int]:
    """Give ``root`` and all its descendants that live."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name, in brackets, may hold spaces; the parent is the second word after it.
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(words[1]), []).append(int(entry.name))
    left = [root]
    while left:
        process = left.pop()
        yield process
        left += parents.get(process, [])


def highest(process: int) -> int:
    """Return the most resident memory that a process has had, in bytes; 0 once it is gone.

    VmHWM, which the kernel keeps: no peak falls between two looks, and looking disturbs nobody.
    """
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return linux_peak(text) or 0


def tree_highest(root: int) -> int:
    """Return the sum for ``root`` and its descendants; what they share counts in each of them."""
    return sum(map(highest, tree(root)))
