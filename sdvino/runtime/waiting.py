"""Waiting for another thread without being deaf to Ctrl-C."""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TypeVar

_LOOK = 0.1

T = TypeVar("T")


def result_of(future: Future[T]) -> T:
    """Return what ``future`` gives once it is done, or raise what it raised.

    Windows sees Ctrl-C only between two waits, so this looks every tenth of a second.
    """
    while not wait([future], timeout=_LOOK).done:
        pass
    return future.result()
