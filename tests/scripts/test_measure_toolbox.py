"""The measurement of the toolbox: its table of variants, its goals, its page, a small run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import measure_toolbox
import pytest
from evaluate_demo import Share
from toolbox_adherence import Adherence, Gallery, TimeLeft, prompts_for
from toolbox_goals import curve, goals, pays_from
from toolbox_goals import variant as variant_of
from toolbox_models import Facts, Workshop, digest_of
from toolbox_record import Findings
from toolbox_report import report
from toolbox_timing import Duel, Times, measure_duel, median_interval, times_faster
from toolbox_variants import (
    BUDGETS,
    FEW_STEPS,
    PAIRS,
    REFERENCE,
    STACK,
    STUDENTS,
    VARIANTS,
    parse_students,
    with_students,
)

from sdvino.compress.recipes import RECIPES, get_recipe
from sdvino.errors import RequestError

WHOLE = Facts(
    parameters=4_000_000,
    nonzero=4_000_000,
    operations=300_000_000,
    unet_bytes=8_000_000,
    bytes=12_000_000,
    float_bytes=24_000_000,
    rank_share=None,
    bits={},
)


def facts(**changes: float | dict[str, int] | None) -> Facts:
    values = {name: getattr(WHOLE, name) for name in Facts.__slots__}
    return Facts(**{**values, **changes})


def adherence(right: float, low: float, **changes: object) -> Adherence:
    values = {
        "weights": "w",
        "stem": "s",
        "steps": 20,
        "guidance_scale": 3.0,
        "prompts": 100,
        "right": Share(right, right - 0.02, right + 0.02),
        "difference": Share(right - 0.96, low, 0.01),
        "versus": None,
        "psnr": 30.0,
        "psnr_tenth": 25.0,
    }
    return Adherence(**{**values, **changes})  # type: ignore[arg-type]


def times(evaluation: float, picture: float) -> Times:
    return Times("w", 20, 3.0, [evaluation] * 3, [picture] * 3)


def verdicts(findings: Findings) -> dict[str, str]:
    return {goal.asked: goal.word for goal in goals(findings)}


def test_every_variant_has_a_name_and_a_recipe_of_its_own(tmp_path: Path) -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    workshop = Workshop(tmp_path, {}, print)
    for variant in VARIANTS:
        recipe = get_recipe(workshop.recipe_of(variant))
        assert bool(recipe.passes) == (variant.group in ("pruning", "low rank")) or variant.student
        assert variant.versus is None or variant.versus in names
        assert variant.student is None or variant.student in STUDENTS
    assert {variant.student for variant in VARIANTS} - {None} == set(STUDENTS)
    assert set(PAIRS) | set(PAIRS.values()) <= set(names)


def test_variants_with_the_same_source_and_recipe_share_a_folder() -> None:
    recipes: dict[str, set[tuple[str | None, str]]] = {}
    for variant in VARIANTS:
        recipes.setdefault(variant.model, set()).add((variant.student, variant.recipe))
    assert all(len(found) == 1 for found in recipes.values())
    assert sum(variant.model == "fp16" for variant in VARIANTS) == 3
    assert "fp16" in RECIPES


def test_students_are_names_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    with pytest.raises(RequestError, match=r"no model_index\.json"):
        parse_students([f"steps={folder}"])
    folder.mkdir()
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    assert parse_students([f"steps={folder}"]) == {"steps": folder}
    for words in ("steps", "=folder", "steps=", "Steps=x", "a b=x"):
        with pytest.raises(RequestError, match="no student"):
            parse_students([words])
    assert with_students(["steps"]) == VARIANTS
    more = with_students(["steps", "tiny"])[len(VARIANTS) :]
    assert [(one.name, one.student, one.recipe) for one in more] == [
        ("student-tiny", "tiny", "fp16"),
        ("tiny-int8", "tiny", "int8"),
    ]


def test_another_scheduler_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    digests = []
    for text in ('{"a": 1}', '{"a": 2}', '{"a": 1}'):
        file.write_text(text, encoding="utf-8")
        digests.append(digest_of(tmp_path))
    assert digests[0] == digests[2] != digests[1]


def test_the_curve_takes_fewer_pictures() -> None:
    counts = prompts_for(VARIANTS, 2000, 400)
    assert counts[REFERENCE] == counts[STACK] == 2000
    assert {counts[f"low-rank-{percent}"] for percent in BUDGETS} == {400}
    assert set(prompts_for(VARIANTS, 40, 400).values()) == {40}


def test_time_left_counts_what_was_really_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 60.0, 61.0])
    monkeypatch.setattr("toolbox_adherence.time.monotonic", lambda: next(now))
    left = TimeLeft({"a": 100.0, "b": 50.0, "c": 200.0})
    assert left.done("a", fresh=0.5) == "2 variants left, 5 min at most"
    assert left.done("b", fresh=0.0) == "1 variants left, 4 min at most"


def test_times_are_compared_round_by_round() -> None:
    # The machine was half as fast in the second round: for both.
    assert times_faster([1.0, 2.0, 1.0], [0.5, 1.0, 0.25]) == 2.0


def test_the_interval_of_a_median_is_two_of_its_values() -> None:
    # Of a hundred throws of a coin, 95 % lie from 40 to 60.
    assert median_interval([float(value) for value in range(100, 0, -1)]) == (40.0, 61.0)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([2.0]) == (2.0, 2.0)


def test_nothing_measured_is_no_verdict() -> None:
    assert set(verdicts(Findings()).values()) == {"not measured"}
    page = report(Findings(), VARIANTS, "python scripts/measure_toolbox.py")
    assert page.count("| not measured |") == len(goals(Findings()))
    assert f"Not measured: {'; '.join(one.title for one in VARIANTS)}." in page
    assert "give it with `--student steps=FOLDER`" in page


def test_the_far_end_of_the_interval_decides() -> None:
    found = Findings(facts={REFERENCE: WHOLE, "local-int4": facts(), "steps": facts()})
    found.adherence["local-int4"] = adherence(0.95, low=-0.0299)
    found.adherence["steps"] = adherence(0.95, low=-0.0401)
    words = verdicts(found)
    assert words["4-bit local: adherence within 3 points of f32"] == "met"
    assert words["4 steps, guidance folded in: within 4 points of 20 steps"] == "missed"


def test_pruning_has_to_cut_enough() -> None:
    found = Findings(facts={REFERENCE: WHOLE, "lean-recovered": facts(operations=200_000_000)})
    found.adherence["lean-recovered"] = adherence(0.95, low=-0.01)
    asked = "30% of the UNet's operations pruned, recovered: adherence within 3 points"
    assert verdicts(found)[asked] == "met"
    found.facts["lean-recovered"] = facts(operations=220_000_000)
    assert verdicts(found)[asked] == "missed"


def test_a_pair_is_judged_by_pictures_and_prompts() -> None:
    local, other = next(iter(PAIRS.items()))
    found = Findings(facts={name: facts() for name in (REFERENCE, local, other)})
    found.adherence[other] = adherence(0.95, low=-0.01, psnr=30.0)
    found.adherence[local] = adherence(0.95, low=-0.01, psnr=34.5, versus=Share(0, -0.01, 0.01))
    goal = goals(found)[0]
    assert goal.word == "met"
    assert "PSNR +4.5 dB, adherence +0.00 points [-1.00, +1.00]" in goal.found
    worse = adherence(0.93, low=-0.01, psnr=34.5, versus=Share(-0.02, -0.03, -0.01))
    found.adherence[local] = worse
    assert goals(found)[0].word == "missed"


def test_the_stack_is_judged_by_pictures_bytes_and_prompts() -> None:
    found = Findings(facts={REFERENCE: WHOLE, STACK: facts(bytes=7_900_000)})
    found.duels = {
        REFERENCE: Duel(["w", "w"], [10.0] * 9, [1.1] * 9),
        FEW_STEPS: Duel(["w", "w"], [1.5] * 8 + [9.0], [1.1] * 9),
    }
    found.adherence[STACK] = adherence(0.94, low=-0.04)
    assert [goal.word for goal in goals(found)[-4:]] == ["met", "missed", "met", "met"]
    assert goals(found)[-3].found == "1.36 x [1.36, 8.18]"
    assert "measured beside the other one alone: 9 pictures" in report(found, VARIANTS, "command")


def test_low_rank_pays_from_where_all_smaller_ones_are_faster() -> None:
    found = Findings(facts={REFERENCE: WHOLE}, times={REFERENCE: times(1.0, 1.0)})
    for percent, seconds in ((90, 1.1), (70, 0.9), (60, 1.01), (50, 0.8), (30, 0.5)):
        name = f"low-rank-{percent}"
        found.facts[name] = facts(parameters=40_000 * percent, rank_share=percent / 200)
        found.times[name] = times(seconds, seconds)
    points = curve(found)
    assert [round(point.weights, 2) for point in points] == [0.9, 0.7, 0.6, 0.5, 0.3]
    start = pays_from(points)
    assert start is not None
    assert start.weights == pytest.approx(0.5)
    assert pays_from(points[:1]) is None
    assert "starts to pay at 50%" in report(found, VARIANTS, "command")
    # Two points of the curve are still to come, and may be slower.
    assert [goal.word for goal in goals(found) if "low rank" in goal.asked] == ["not measured"]
    for percent in (80, 40):
        name = f"low-rank-{percent}"
        found.facts[name] = facts(parameters=40_000 * percent, rank_share=percent / 200)
        found.times[name] = times(0.7, 0.7)
    assert [goal.word for goal in goals(found) if "low rank" in goal.asked] == ["met"]


def test_what_was_drawn_less_often_is_told() -> None:
    names = (REFERENCE, "magnitude-30", "low-rank-90")
    found = Findings(facts={name: facts() for name in names})
    for name, prompts in zip(names, (2000, 400, 400), strict=True):
        found.adherence[name] = adherence(0.96, low=-0.01, prompts=prompts)
    page = report(found, VARIANTS, "command")
    fewer = "magnitude pruning, 30 % zeros; low rank, 90 % of the weights"
    assert "Adherence: 2000 prompts of" in page
    assert f"(the first 400 for: {fewer})" in page


def test_findings_come_back_as_they_were(tmp_path: Path) -> None:
    found = Findings(
        facts={REFERENCE: WHOLE},
        adherence={
            REFERENCE: adherence(0.96, 0.0, difference=None, psnr=None, psnr_tenth=None),
            "lean": adherence(0.5, low=-0.5, versus=Share(0.1, 0.0, 0.2)),
        },
        times={REFERENCE: times(1, 2)},
        duels={"lean": Duel(["w", "s"], [2.0], [1.0]), FEW_STEPS: Duel(["v", "s"], [3.0], [1.0])},
        machine={"threads": None},
    )
    found.save(tmp_path / "new" / "findings.json")
    again = Findings.load(tmp_path / "new" / "findings.json")
    assert again == found
    assert Findings.load(tmp_path / "none.json") == Findings()
    again.forget_others({"lean": "other weights", REFERENCE: "w", STACK: "s"})
    assert list(again.adherence) == [REFERENCE]
    assert list(again.times) == [REFERENCE]
    assert list(again.duels) == [FEW_STEPS]
    again.forget_others({STACK: "other weights"})
    assert not again.duels


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "real"],
        ["--prompts", "0"],
        ["--rounds", "0"],
        ["--duels", "0"],
        ["--curve-prompts", "-1"],
    ],
)
def test_absurd_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        measure_toolbox.parse(arguments)
    assert stop.value.code == 2


def test_an_unknown_variant_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--variant", "int3", "--record", str(tmp_path), "--out", str(tmp_path / "docs")]
    assert measure_toolbox.main(arguments) == 2
    assert "no variant 'int3'; choose from: f32," in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


@pytest.mark.slow
def test_a_small_run_goes_on_and_writes_the_page(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model stands in for the float one, too: nothing is converted here."""
    record, out = tmp_path / "record", tmp_path / "docs"
    for name in ("fp16", "int8"):
        folder = record / "models" / name
        shutil.copytree(shapes, folder)
        manifest = json.loads((folder / "sdvino.json").read_text(encoding="utf-8"))
        text = json.dumps({**manifest, "source": "shapes-source", "recipe": name})
        (folder / "sdvino.json").write_text(text, encoding="utf-8")
    arguments = ["--record", str(record), "--out", str(out), "--rounds", "1"]
    arguments += ["--variant", "int8", "--variant", FEW_STEPS]
    assert measure_toolbox.main([*arguments, "--prompts", "1", "--only", "adherence"]) == 0
    assert "1/1 pictures" in capsys.readouterr().err
    assert measure_toolbox.main([*arguments, "--prompts", "2"]) == 0
    assert "int8: 2 pictures, 20 steps, guidance 3" in capsys.readouterr().err
    found = Findings.load(out / "compression.json")
    assert list(found.adherence) == list(found.times) == [REFERENCE, FEW_STEPS, "int8"]
    assert {one.prompts for one in found.adherence.values()} == {2}
    assert found.adherence["int8"].psnr == 99.0  # the same model
    assert found.adherence[FEW_STEPS].psnr is None  # other pictures
    assert found.adherence[FEW_STEPS].difference is not None
    gallery = Gallery(record, 2, found.adherence, print)
    variant = replace(VARIANTS[0], versus=FEW_STEPS)
    assert gallery.draw(variant, record / "models" / "fp16", 2).versus is not None
    assert [len(one.picture) for one in found.times.values()] == [1, 1, 1]
    model = record / "models" / "fp16"
    duel = measure_duel((VARIANTS[0], model), (variant_of(FEW_STEPS), model), 2, None)
    assert [len(duel.slower), len(duel.faster)] == [2, 2]
    assert times_faster(duel.slower, duel.faster) > 1  # 20 steps against 4
    assert found.times[REFERENCE].picture[0] > found.times[FEW_STEPS].picture[0] > 0
    page = (out / "compression.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        assert "![" not in line or (out / line.rpartition("(")[2].strip(")")).is_file()
    assert "python scripts/measure_toolbox.py --prompts 2" in page
    assert str(tmp_path) not in page + (out / "compression.json").read_text(encoding="utf-8")
    shutil.rmtree(record / "pictures")
    assert measure_toolbox.main([*arguments, "--only", "report"]) == 0
