"""Tasks that ask for evaluations of one model, taken step by step together.

A model that is in memory in parts only is evaluated fastest on many inputs at a time. Tasks that
each need the answer before they can ask again still ask together, when each runs in a thread of
its own and all wait until the last has asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


def run_together(
    tasks: Sequence[Callable[[Callable[[Question], Answer]], Result]],
    answer: Callable[[list[Question]], Sequence[Answer]],
) -> list[Result]:
    """Return what ``tasks`` return, in order; each is given what it asks with.

    ``answer`` runs in the calling thread, on the questions of all tasks that are not finished, in
    the tasks' order: the same tasks ask the same questions together each time. What it or a task
    raises is raised here, when no task runs any more.
    """
    room: _Room[Question, Answer] = _Room(len(tasks))
    results: list[Any] = [None] * len(tasks)

    def work(index: int) -> None:
        try:
            results[index] = tasks[index](lambda question: room.ask(index, question))
        except BaseException as error:
            room.fail(error)
        finally:
            room.leave()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    try:
        while questions := room.questions():
            room.give(dict(zip(questions, answer(list(questions.values())), strict=True)))
    except BaseException as error:
        room.fail(error)
        raise
    finally:
        for thread in threads:
            thread.join()
    if room.error is not None:
        raise room.error
    return results


class _Room(Generic[Question, Answer]):
    """Where tasks wait for their answers."""

    def __init__(self, tasks: int) -> None:
        self.error: BaseException | None = None
        self._running = tasks
        self._asked: dict[int, Question] = {}
        self._given: dict[int, Answer] = {}
        self._changed = threading.Condition()

    def ask(self, index: int, question: Question) -> Answer:
        """Wait for the answer; raises _Stopped when there will be none."""
        with self._changed:
            self._asked[index] = question
            self._changed.notify_all()
            self._changed.wait_for(lambda: index in self._given or self.error is not None)
            if index not in self._given:
                raise _Stopped
            return self._given.pop(index)

    def leave(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let every task end; the first failure counts."""
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def questions(self) -> dict[int, Question]:
        """Wait until every task has asked or is finished; return the questions, none at the end."""
        with self._changed:
            # In short waits: without them Ctrl-C is not heard on Windows.
            while not self._complete():
                self._changed.wait(0.5)
            return {} if self.error is not None else dict(sorted(self._asked.items()))

    def give(self, answers: dict[int, Answer]) -> None:
        with self._changed:
            self._asked.clear()
            self._given.update(answers)
            self._changed.notify_all()

    def _complete(self) -> bool:
        return self.error is not None or len(self._asked) == self._running


class _Stopped(Exception):
    """Ends a task whose question stays without an answer."""
