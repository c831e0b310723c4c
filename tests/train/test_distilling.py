"""Distillation of folders: by the command, in a recipe, interrupted, and refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_synthetic
import pytest

from sdvino.cli.distill import Lines
from sdvino.cli.main import main
from sdvino.compress.recipe_file import from_toml
from sdvino.convert.api import _decide, convert, make_request
from sdvino.convert.request import WorkPlan
from sdvino.convert.source import DiffusersFolder
from sdvino.convert.source_passes import recording
from sdvino.convert.state import work_path
from sdvino.convert.suggestions import trained_steps
from sdvino.convert.worker import run_step
from sdvino.errors import Cancelled, RequestError
from sdvino.folder.manifest import Manifest
from sdvino.nets.structure import Structure
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.distilling import distill, work_folder
from sdvino.train.modules import apply, load_component, save_component
from tests.tiny_folder import edit_json

SMALL: dict[str, Any] = {
    "iterations": 6,
    "batch": 2,
    "drawn": 4,
    "teacher_steps": 4,
    "student_steps": 2,
}
RECIPE = """
name = 'lean'

[[passes]]
kind = 'prune'
share = 0.3

[[passes]]
kind = 'distill'
iterations = 20
batch = 2
drawn = 2
teacher_steps = 2
student_steps = 1
prompts = ['a red circle', 'a blue ring']

[[passes]]
kind = 'quantize'
scheme = 'int8-weights'
"""
quiet_libraries = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    make_synthetic.make("tiny-sd15", folder)
    (folder / "calibration_prompts.txt").write_text("a red circle\na blue ring\n", "utf-8")
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.slow
@quiet_libraries
def test_interrupted_a_distillation_goes_on_to_the_same_folder(tiny: Path, tmp_path: Path) -> None:
    settings = DistillSettings(objective="steps", **SMALL)
    out, again = tmp_path / "student", tmp_path / "again"

    def stop(stage: str, share: float) -> None:
        if stage == "training" and share >= 0.5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Cancelled, match="run the same command again"):
        distill(tiny, out, settings=settings, progress=stop)
    assert not out.exists()
    assert work_folder(out).is_dir()
    shares: list[float] = []
    distill(tiny, out, settings=settings, progress=lambda stage, share: shares.append(share))
    assert not work_folder(out).exists()
    distill(tiny, again, settings=settings, work=tmp_path / "work")
    assert (tmp_path / "work").is_dir()
    assert weights(out) == weights(again)
    assert weights(out) != weights(tiny)
    source = DiffusersFolder.open(out)
    assert trained_steps(source) == 2
    assert trained_steps(DiffusersFolder.open(tiny)) is None
    scheduler = source.configs["scheduler"]
    assert (scheduler["_class_name"], scheduler["timestep_spacing"]) == (
        "DDIMScheduler",
        "trailing",
    )
    request = make_request(out, recipe="int8")
    plan, hints = _decide(request, request.resolve_recipe(), source)
    assert hints == {"num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "ddim"}
    assert set(plan.calibration.few_steps) == {2}
    assert plan.calibration.sampler == "ddim"
    told = json.loads((out / "distillation.json").read_text(encoding="utf-8"))
    assert (told["teacher"], told["objective"], told["iterations"]) == ("tiny", "steps", 6)


@pytest.mark.slow
@quiet_libraries
def test_the_command_teaches_a_smaller_student(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lean = tmp_path / "lean"
    module = load_component(tiny / "unet", "unet")
    structure = Structure(removed=("mid_block.attentions.0",))
    apply(structure, module)
    config = json.loads((tiny / "unet" / "config.json").read_text(encoding="utf-8"))
    save_component(module, lean, config=config, structure=structure)
    arguments = ["distill", str(tiny), "-o", str(tmp_path / "out"), "--student", str(lean)]
    arguments += ["--iterations", "3", "--batch", "1", "--drawn", "2", "--teacher-steps", "4"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "recover: 3 iterations of 1" in printed.out
    assert f"sdvino convert {tmp_path / 'out'} FOLDER" in printed.out
    assert "sdvino: training: 100%" in printed.err
    out = DiffusersFolder.open(tmp_path / "out")
    assert Structure.read(out.folder("unet")) == structure
    assert out.configs["scheduler"] == DiffusersFolder.open(tiny).configs["scheduler"]
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--quiet"]) == 0


def assert_zeros_are_kept(before: Path, after: Path) -> None:
    """What pruning set to zero is zero still; biases that began at zero may learn."""
    pruned, learnt = (load_component(f / "unet", "unet").state_dict() for f in (before, after))
    masks = {name: value == 0 for name, value in pruned.items() if value.ndim >= 2}
    masks = {name: mask for name, mask in masks.items() if mask.float().mean() > 0.01}
    assert len(masks) > 50
    assert not any((learnt[name][mask] != 0).any() for name, mask in masks.items())


@pytest.mark.slow
@quiet_libraries
def test_a_recipe_that_distills_goes_on_to_the_same_model(tiny: Path, tmp_path: Path) -> None:
    recipe, target = tmp_path / "lean.toml", tmp_path / "model"
    recipe.write_text(RECIPE, encoding="utf-8")
    work, kept = work_path(target), tmp_path / "kept"

    def stop(what: str, share: float) -> None:
        if what == "pass 2-distill" and any((work / "learning").glob("drawn-*/*")):
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match="run the same command again"):
        convert(tiny, target, recipe=recipe, progress=stop)
    drawn = next((work / "learning").glob("drawn-*/00000.safetensors"))
    made = drawn.stat().st_mtime_ns

    def keep(what: str, share: float) -> None:
        if what.startswith("export") and not kept.exists():
            shutil.copytree(work, kept)
            assert drawn.stat().st_mtime_ns == made

    folder = convert(tiny, target, recipe=recipe, progress=keep)
    assert not work.exists()
    again = tmp_path / "again"
    for name in ("passes", "tmp"):
        (again / name).mkdir(parents=True)
    plan = WorkPlan.read(kept)
    for step in ("pass 1-prune", "pass 2-distill"):
        run_step(plan, again, step, lambda share: None)
    assert weights(kept / "passes" / "2-distill") == weights(again / "passes" / "2-distill")
    manifest = Manifest.read(folder.path)
    assert manifest is not None
    learnt = dict(manifest.passes[1])
    assert learnt["settings"]["prompts"] == ["a red circle", "a blue ring"]
    assert_zeros_are_kept(*(kept / "passes" / name for name in ("1-prune", "2-distill")))
    assert "peak memory" in (folder.path / "passes.md").read_text(encoding="utf-8")


def steps_recipe(tmp_path: Path, **keys: Any) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    text = "\n".join(["[[passes]]", "kind = 'distill'", *lines])
    prune = "\n[[passes]]\nkind = 'prune'\nmethod = 'heads'\nshare = 0.1\n"
    path = tmp_path / "steps.toml"
    path.write_text(prune + text + "\n", encoding="utf-8")
    return path


def test_what_a_recipe_makes_of_steps_the_model_suggests(source: Path, tmp_path: Path) -> None:
    request = make_request(source, recipe=steps_recipe(tmp_path, objective="steps"))
    opened = request.open_source(tmp_path)
    plan, hints = _decide(request, request.resolve_recipe(), opened)
    assert hints == {"num_inference_steps": 4, "guidance_scale": 1.0, "scheduler": "ddim"}
    assert plan.calibration.few_steps == (4,)
    # What comes before the distillation is measured as the source is used.
    recorded = recording(plan, opened)
    assert recorded.guidance_scale == 7.5
    assert recorded.few_steps == ()
    assert recorded.branches == 2
    other = make_request(
        source, recipe=steps_recipe(tmp_path, objective="guidance"), suggested={"steps": 9}
    )
    _, hints = _decide(other, other.resolve_recipe(), opened)
    assert (hints["num_inference_steps"], hints["guidance_scale"]) == (9, 1.0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"teacher_steps": 6, "student_steps": 3}, "6 steps do not divide the model's 1000"),
        ({"pictures": "none"}, "none is no folder"),
    ],
)
def test_a_recipe_is_refused_before_anything_is_begun(
    source: Path, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    request = make_request(source, recipe=steps_recipe(tmp_path, **keys))
    with pytest.raises(RequestError, match=said):
        _decide(request, request.resolve_recipe(), request.open_source(tmp_path))


def test_pictures_of_a_recipe_lie_beside_it_and_are_told_by_name(tmp_path: Path) -> None:
    text = "[[passes]]\nkind = 'distill'\npictures = 'photos'\n"
    row = from_toml(text, folder=tmp_path).passes[0]
    assert getattr(row, "pictures") == str(tmp_path / "photos")  # noqa: B009  (of its class)
    assert row.told() == {"pictures": "photos"}


def wide_student(folder: Path) -> None:
    shutil.copytree(folder / "a-model" / "unet", folder / "wide")
    path = folder / "wide" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "cross_attention_dim": 768}), encoding="utf-8")


def other_prediction(folder: Path) -> None:
    shutil.copytree(folder / "a-model", folder / "other")
    path = folder / "other" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}), encoding="utf-8")


def no_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("# nothing\n\n", encoding="utf-8")


def some_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red circle\n", encoding="utf-8")


def a_picture(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos" / "x.png").write_bytes(b"")
    some_prompts(folder)


def something_there(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "letter.txt").write_text("dear", encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said", "prepare"),
    [
        (["--objective", "copy"], "Unknown objective 'copy'; choose one of: recover, guid", None),
        (
            ["--student", "wide"],
            "attends to text 768 wide and its teacher .* 32 wide",
            wide_student,
        ),
        (["--student", "other"], "predicts v_prediction and its teacher epsilon", other_prediction),
        (["--student", "none"], "none holds no UNet", None),
        (["--prompts", "prompts.txt"], "holds no prompt", no_prompts),
        (["--prompts", "none.txt"], "missing", None),
        (["--pictures", "none"], "none is no folder", None),
        (["--pictures", "photos"], "has no caption", a_picture),
        (
            ["--pictures", "photos", "--prompts", "prompts.txt"],
            "prompts or from pictures",
            a_picture,
        ),
        (["--iterations", "5", "--minutes", "1"], "one of them", None),
        (["--iterations", "0"], "iterations is 0", None),
        (["--teacher-steps", "6", "--student-steps", "3"], "do not divide", None),
        (["--student-steps", "3"], "cannot be shared out", None),
        ([], "out is not empty", something_there),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
    prepare: Callable[[Path], None] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["distill", str(source), "--out", "out", *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told), told
    assert len(told.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_teachers_that_cannot_teach_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is, or holds, the teacher"):
        distill(source, source.parent, overwrite=True)
    edit_json(source / "unet" / "config.json", in_channels=9)
    with pytest.raises(RequestError, match="cannot teach yet; give a model"):
        distill(source, tmp_path / "out")
    with pytest.raises(RequestError, match="does not exist"):
        distill(tmp_path / "none", tmp_path / "out")


def test_progress_is_told_in_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for now, share in ((0.0, 0.1), (10.0, 0.2), (40.0, 0.3), (41.0, 0.31), (200.0, 1.0)):  # noqa: B007
        lines.show("training", share)
    lines.show("drawing", 0.5)
    assert capsys.readouterr().err.splitlines() == [
        "sdvino: training: 10%",
        "sdvino: training: 30%  (2:20 left)",
        "sdvino: training: 100%",
        "sdvino: drawing: 50%",
    ]
