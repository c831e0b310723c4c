from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sdvino.compress.lockstep import run_together


def counting(start: int, steps: int) -> Callable[[Callable[[int], int]], int]:
    """A task that asks ``steps`` times, each time for what it was told plus one."""

    def task(ask: Callable[[int], int]) -> int:
        value = start
        for _ in range(steps):
            value = ask(value)
        return value

    return task


def test_tasks_ask_together_until_each_is_finished() -> None:
    asked: list[list[int]] = []

    def answer(questions: list[int]) -> list[int]:
        asked.append(list(questions))
        return [question + 1 for question in questions]

    found = run_together([counting(0, 2), counting(10, 1), counting(20, 3)], answer)
    assert found == [2, 11, 23]
    assert asked == [[0, 10, 20], [1, 21], [22]]


def test_tasks_that_ask_nothing() -> None:
    assert run_together([counting(5, 0), counting(6, 0)], list) == [5, 6]
    assert run_together([], list) == []


def test_what_the_model_raises_ends_every_task() -> None:
    before = threading.active_count()

    def answer(questions: list[int]) -> list[int]:
        if questions[0] == 2:
            raise KeyboardInterrupt
        return [question + 1 for question in questions]

    with pytest.raises(KeyboardInterrupt):
        run_together([counting(0, 5), counting(10, 5)], answer)
    assert threading.active_count() == before


def test_what_a_task_raises_is_raised_here() -> None:
    def failing(ask: Callable[[int], int]) -> int:
        ask(1)
        raise ValueError("no numbers")

    with pytest.raises(ValueError, match="no numbers"):
        run_together([failing, counting(0, 3)], list)
