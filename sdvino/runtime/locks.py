"""A lock that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


class FileLock:
    """A lock on the file ``path``, which is made when it is not there; raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock, waiting for its holder or not; tell whether it was taken."""
        try:
            if sys.platform == "win32":
                import msvcrt

                self._file.seek(0)
                mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK
                msvcrt.locking(self._file.fileno(), mode, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            self._file.close()
            return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):
            self._file.close()
