from pathlib import Path

import evaluate_demo
import numpy as np
import pytest
import scenes
from PIL import Image


def painter(tasks: list[evaluate_demo.Task], wrong: set[int]) -> evaluate_demo.Generate:
    """A perfect model: it draws what was asked, but pictures in `wrong` stay empty."""

    def generate(prompts: list[str], seed: int) -> list[Image.Image]:
        pictures = []
        for i, text in enumerate(prompts, start=seed):
            prompt = tasks[i].prompt
            assert text == prompt.text
            scene = scenes.Scene(str(prompt.background), () if i in wrong else place(prompt))
            pictures.append(Image.fromarray(scenes.draw(scene)))
        return pictures

    return generate


def place(prompt: scenes.Prompt) -> tuple[scenes.Placed, ...]:
    def radius(wanted: scenes.Wanted) -> float:
        return scenes.RADII[wanted.size or "medium"]

    wanted = prompt.objects
    if prompt.relation is None:
        column, row = scenes.POSITIONS[prompt.position or "in the center"]
        at = [(scenes.GRID_CENTRES[column], scenes.GRID_CENTRES[row])]
    else:
        low, high = 32.0, 96.0
        at = [(low, 64.0), (high, 64.0)]
        if prompt.relation in ("to the right of", "below"):
            at.reverse()
        if not prompt.relation.startswith("to"):
            at = [(y, x) for x, y in at]
    return tuple(
        scenes.Placed(w.colour, w.shape, radius(w), x, y)
        for w, (x, y) in zip(wanted, at, strict=True)
    )


def test_tasks_are_held_out_and_repeatable() -> None:
    tasks = evaluate_demo.held_out_tasks(50)
    assert tasks == evaluate_demo.held_out_tasks(50)
    assert [task.seed for task in tasks] == list(range(50))
    for task in tasks:
        for wanted in task.prompt.objects:
            triple = (wanted.colour, wanted.shape, str(task.prompt.background))
            assert triple in scenes.held_out_triples()


def test_a_perfect_model_is_right_and_an_empty_picture_is_not() -> None:
    tasks = evaluate_demo.held_out_tasks(24)
    verdicts = evaluate_demo.evaluate(painter(tasks, {3, 4}), tasks)
    right = evaluate_demo.column(verdicts, "core")
    assert np.flatnonzero(~right).tolist() == [3, 4]
    shares = evaluate_demo.summary(tasks, verdicts)
    assert shares["one object: colour, shape, background"].value == pytest.approx(11 / 12)
    assert shares["  background"].value == 1


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    tasks = evaluate_demo.held_out_tasks(12)
    record = tmp_path / "verdicts.jsonl"
    generate = painter(tasks, {1})

    def stops(prompts: list[str], seed: int) -> list[Image.Image]:
        if seed >= 8:
            raise KeyboardInterrupt
        return generate(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluate_demo.evaluate(stops, tasks, batch=4, record=record, key={"steps": 20})

    def goes_on(prompts: list[str], seed: int) -> list[Image.Image]:
        assert seed == 8
        return generate(prompts, seed)

    verdicts = evaluate_demo.evaluate(goes_on, tasks, batch=4, record=record, key={"steps": 20})
    assert (verdicts == evaluate_demo.evaluate(generate, tasks)).all()


def test_a_record_of_other_settings_is_not_used(tmp_path: Path) -> None:
    tasks = evaluate_demo.held_out_tasks(2)
    record = tmp_path / "verdicts.jsonl"
    evaluate_demo.evaluate(painter(tasks, {0, 1}), tasks, record=record, key={"steps": 4})
    verdicts = evaluate_demo.evaluate(painter(tasks, set()), tasks, record=record, key={"steps": 9})
    assert evaluate_demo.column(verdicts, "core").all()


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (920, 1000, 0.9016, 0.9353)],
)
def test_wilson(successes: int, count: int, low: float, high: float) -> None:
    share = evaluate_demo.wilson(successes, count)
    assert share.low == pytest.approx(low, abs=1e-3)
    assert share.high == pytest.approx(high, abs=1e-3)


def test_paired_difference() -> None:
    before = np.array([True] * 90 + [False] * 10)
    after = before.copy()
    after[:8] = False
    after[95:] = True
    share = evaluate_demo.paired_difference(before, after)
    assert share.value == pytest.approx(-0.03)
    assert share.low < share.value < share.high
    same = evaluate_demo.paired_difference(before, before)
    assert same.value == 0
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="one length"):
        evaluate_demo.paired_difference(before, after[:5])
