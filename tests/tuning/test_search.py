"""The search over fake measurements: nothing here takes time, the clock is a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvino.errors import DeviceError
from sdvino.tuning.search import Axis, Candidate, Found, Trial, search

Settings = tuple[str, ...]


class Machine:
    """Takes so many seconds a run, times factors by setting; a clock runs along."""

    def __init__(self, factors: Mapping[str, float], overhead: float = 0.0) -> None:
        self.factors = factors
        self.overhead = overhead
        self.now = 0.0
        self.measured: list[Settings] = []

    def measure(self, settings: Settings) -> float:
        self.measured.append(settings)
        seconds = math.prod(self.factors[name] for name in settings)
        self.now += seconds + self.overhead
        return seconds

    def left(self, budget: float) -> Callable[[], float]:
        return lambda: budget - self.now


def axis(name: str, *values: str) -> Axis[Settings]:
    """The best so far, and other values in place of its last."""

    def candidates(best: Settings) -> list[Candidate[Settings]]:
        others = [(*best[:-1], value) for value in values]
        return [
            Candidate("as it is", best),
            *(Candidate(word, (*other,)) for word, other in zip(values, others, strict=True)),
        ]

    return Axis(name, candidates)


def run(machine: Machine, *axes: Axis[Settings], budget: float = 1e6) -> Found[Settings]:
    return search(("default",), axes, machine.measure, time_left=machine.left(budget))


def test_the_fastest_is_found_and_measured_most() -> None:
    machine = Machine({"default": 4.0, "a": 5.0, "b": 2.0, "c": 3.0})
    found = run(machine, axis("cores", "a", "b", "c"))
    assert found.settings == ("b",)
    assert (found.default_seconds, found.seconds) == (4.0, 2.0)
    assert found.complete
    runs = {trial.candidate.label: len(trial.seconds) for trial in found.trials}
    assert runs["a"] == 1
    assert runs["b"] == max(runs.values())
    assert [trial.candidate.label for trial in found.trials if trial.chosen] == ["b"]


def test_the_second_axis_starts_from_the_first_one_s_winner() -> None:
    machine = Machine({"default": 4.0, "fast": 2.0, "faster": 1.0, "slow": 9.0})
    found = run(machine, axis("first", "slow", "fast"), axis("second", "faster"))
    assert found.settings == ("faster",)
    assert found.default_seconds == 4.0
    second = [trial for trial in found.trials if trial.axis == "second"]
    assert second[0].candidate.settings == ("fast",)


def test_a_gain_within_the_noise_changes_nothing() -> None:
    found = run(Machine({"default": 1.0, "a": 0.99}), axis("cores", "a"), axis("more", "a"))
    assert found.settings == ("default",)
    assert found.seconds == found.default_seconds == 1.0


def test_what_won_while_others_were_slowed_down_gives_way_to_the_defaults() -> None:
    machine = Machine({"default": 1.0, "a": 1.2, "b": 1.4})

    def measure(settings: Settings) -> float:
        busy = ("b",) in machine.measured and settings == ("default",)
        return machine.measure(settings) * (1.5 if busy else 1.0)

    axes = (axis("first", "b"), axis("second", "a"))
    found = search(("default",), axes, measure, time_left=machine.left(1e6))
    assert found.settings == ("default",)
    assert found.seconds == found.default_seconds == 1.0
    assert {trial.candidate.settings for trial in found.trials if trial.chosen} == {("default",)}


def test_what_cannot_be_run_is_left_out_and_said() -> None:
    machine = Machine({"default": 2.0, "a": 1.0, "gpu": 0.1})

    def measure(settings: Settings) -> float:
        if "gpu" in settings:
            raise DeviceError("its results are off by 300%")
        return machine.measure(settings)

    seen: list[Trial[Settings]] = []
    found = search(
        ("default",),
        [axis("device", "gpu", "a")],
        measure,
        time_left=lambda: 1.0,
        report=seen.append,
    )
    assert found.settings == ("a",)
    (gpu,) = (trial for trial in found.trials if trial.candidate.label == "gpu")
    assert gpu.problem == "its results are off by 300%"
    assert any(trial.problem for trial in seen)


def test_where_the_default_cannot_be_run_the_best_other_is_taken() -> None:
    def measure(settings: Settings) -> float:
        if settings == ("default",):
            raise DeviceError("no")
        return {"a": 2.0, "b": 1.0}[settings[0]]

    found = search(("default",), [axis("device", "a", "b")], measure, time_left=lambda: 1.0)
    assert found.settings == ("b",)
    assert (found.default_seconds, found.seconds) == (None, 1.0)


def test_where_nothing_can_be_run_nothing_is_found() -> None:
    def measure(settings: Settings) -> float:
        raise DeviceError("no")

    found = search(("default",), [axis("device", "a")], measure, time_left=lambda: 1.0)
    assert (found.settings, found.seconds) == (("default",), None)


@pytest.mark.parametrize("budget", [5.0, 8.0, 12.0, 60.0])
def test_the_time_is_kept(budget: float) -> None:
    machine = Machine({"default": 2.0, "a": 1.0, "b": 1.5, "c": 3.0}, overhead=1.0)
    found = run(machine, axis("first", "a", "b", "c"), axis("second", "b"), budget=budget)
    # A measurement is expected to take as long as the longest before it: c takes a second more.
    assert machine.now <= budget + 1.0
    assert found.complete == (budget == 60.0)
    assert found.settings in {("default",), ("a",)}


def test_without_time_for_one_run_nothing_is_claimed() -> None:
    found = run(Machine({"default": 2.0, "a": 1.0}), axis("cores", "a"), budget=0.0)
    assert found.trials == ()
    assert (found.settings, found.seconds, found.complete) == (("default",), None, False)


def test_the_default_s_own_noise_is_no_gain() -> None:
    times = iter([4.0, 3.0, 3.0, 3.0])
    axes = [axis("device"), axis("cores", "slower")]
    found = search(
        ("default",),
        axes,
        lambda settings: 9.0 if settings == ("slower",) else next(times),
        time_left=lambda: 1.0,
    )
    assert found.default_seconds == found.seconds == 3.0


@pytest.mark.parametrize(("stop_at", "winner"), [(1, "default"), (2, "default"), (3, "a")])
def test_ctrl_c_keeps_the_best_so_far(stop_at: int, winner: str) -> None:
    machine = Machine({"default": 4.0, "a": 1.0, "b": 0.1})

    def measure(settings: Settings) -> float:
        if len(machine.measured) + 1 == stop_at:
            raise KeyboardInterrupt
        return machine.measure(settings)

    found = search(("default",), [axis("x", "a", "b")], measure, time_left=lambda: 1e6)
    assert found.interrupted
    assert not found.complete
    assert found.settings == (winner,)


def test_an_axis_without_choices_is_measured_only_when_it_is_the_first() -> None:
    machine = Machine({"default": 4.0})
    found = run(machine, axis("device"), axis("cores"), Axis("none", lambda best: []))
    assert machine.measured == [("default",)]
    assert (found.default_seconds, found.seconds) == (4.0, 4.0)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=9))
def test_it_never_ends_slower_than_it_began(others: list[float]) -> None:
    names = [f"n{i}" for i in range(len(others))]
    factors = {"default": 1.0, **dict(zip(names, others, strict=True))}
    found = run(Machine(factors), axis("x", *names))
    best = min(factors.values())
    chosen = factors[found.settings[0]]
    assert chosen <= best * 1.04
    assert found == run(Machine(factors), axis("x", *names))
