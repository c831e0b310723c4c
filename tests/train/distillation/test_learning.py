"""Students in miniature learn, go on where they stopped, and keep what pruning did."""

from __future__ import annotations

import copy
import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvino.errors import RequestError, SdvinoError
from sdvino.train.calls import outputs_of, relative_error
from sdvino.train.distillation.engine import Material, distill_unet
from sdvino.train.distillation.models import ask, ask_guided, encode_texts
from sdvino.train.distillation.noise_levels import NoiseLevels
from sdvino.train.distillation.objectives import Features, feature_loss
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.lean_modules import keep_heads
from sdvino.train.prune import prune_magnitude
from tests.train.distillation.students import (
    PROMPTS,
    SCHEDULER,
    TEXT_WIDTH,
    learn,
    models,
    shaken,
    teacher,
)

OBJECTIVES = ("steps", "recover", "guidance", "consistency")
pytestmark = [
    pytest.mark.slow,  # most of it for importing what they train
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def samples() -> list[dict[str, Any]]:
    """Calls with the texts that students learn: other noise."""
    states = encode_texts(models(), PROMPTS, "cpu").numpy()
    rng = np.random.default_rng(5)
    return [
        {
            "sample": rng.standard_normal((1, 4, 4, 4), dtype=np.float32),
            "timestep": np.array([t]),
            "encoder_hidden_states": states[i % 3][None],
        }
        for i, t in enumerate((950, 700, 450, 200, 60))
    ]


def distance(student: Any) -> float:
    return relative_error(outputs_of(student, samples()), outputs_of(teacher(), samples()))


def test_a_student_that_lost_its_way_comes_back(tmp_path: Path) -> None:
    student = shaken(teacher())
    before = distance(student)
    found = learn(tmp_path, models(student), objective="recover", iterations=40)
    assert found.module is student
    assert distance(found.module) < 0.6 * before
    log = [json.loads(line) for line in (found.folder / "loss.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log] == [10, 20, 30, 40]
    assert log[-1]["output"] < 0.6 * log[0]["output"]
    assert log[-1]["blocks"] < 0.8 * log[0]["blocks"]
    with Image.open(found.folder / "loss.png") as plot:
        assert plot.width > 300
    assert found.figures["iterations"] == 40
    assert found.figures["peak_memory_bytes"] > 1e8
    assert not student._forward_hooks
    assert not any(p.requires_grad for p in student.parameters())


def guided(unet: Any, scale: float, conditional: bool) -> Any:
    states = encode_texts(models(), ("", *PROMPTS), "cpu")
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([900, 500, 100])
    if conditional:
        with torch.no_grad():
            return ask(unet, x, t, states[1:])
    return ask_guided(unet, x, t, states[1:], states[0], scale)


def test_guidance_is_folded_into_one_evaluation(tmp_path: Path) -> None:
    wanted = guided(teacher(), 3.0, conditional=False)
    before = relative_error([guided(teacher(), 3.0, conditional=True)], [wanted])
    found = learn(tmp_path, objective="guidance", iterations=40)
    after = relative_error([guided(found.module, 3.0, conditional=True)], [wanted])
    assert after < 0.8 * before


def ends(unet: Any, steps: int, scale: float) -> Any:
    """Where DDIM from the same noise ends."""
    levels = NoiseLevels(SCHEDULER)
    states = encode_texts(models(), ("", *PROMPTS), "cpu")
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    grid = levels.grid(steps)
    for t, to in pairwise(grid):
        at = torch.full((3,), t)
        output = ask_guided(unet, x, at, states[1:], states[0], scale)
        x = levels.jump(output, x, at, torch.full((3,), to))
    return x


@pytest.mark.parametrize("objective", ["steps", "consistency"])
def test_two_steps_lead_where_eight_guided_ones_did(tmp_path: Path, objective: str) -> None:
    wanted = ends(teacher(), 8, 3.0)
    before = relative_error([ends(teacher(), 2, 1.0)], [wanted])
    found = learn(tmp_path, objective=objective, iterations=40, drawn=16, teacher_steps=8)
    after = relative_error([ends(found.module, 2, 1.0)], [wanted])
    assert after < 0.85 * before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_interrupted_it_goes_on_to_the_same_student(tmp_path: Path, objective: str) -> None:
    whole = learn(tmp_path / "whole", objective=objective, iterations=12)

    def stop(stage: str, share: float) -> None:
        if stage == "training" and 0.45 < share < 0.55:
            signal.raise_signal(signal.SIGINT)

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "parts", progress=stop, objective=objective, iterations=12)
    found = learn(
        tmp_path / "parts",
        progress=lambda stage, share: told.append(f"{stage} {share:.2f}"),
        objective=objective,
        iterations=12,
    )
    assert "training 0.50" not in told
    assert told[-1] == "training 1.00"
    for name, value in whole.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name
    keys = ("iteration", "rate", "loss", "gradient")
    logs = [
        [json.loads(line) for line in (one.folder / "loss.jsonl").read_text().splitlines()]
        for one in (whole, found)
    ]
    assert [line["iteration"] for line in logs[1]] == [10]
    assert [[line[k] for k in keys[:2]] for line in logs[1]] == [
        [line[k] for k in keys[:2]] for line in logs[0]
    ]


def test_interrupted_while_it_draws_it_goes_on_with_the_rest(tmp_path: Path) -> None:
    def stop(stage: str, share: float) -> None:
        if stage == "drawing" and share > 0.4:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"objective": "steps", "drawn": 40, "iterations": 2}
    whole = learn(tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "parts", progress=stop, **how)
    drawn = next((tmp_path / "parts").glob("drawn-*"))
    first = [(path.name, path.stat().st_mtime_ns) for path in sorted(drawn.iterdir())]
    assert len(first) == 2
    found = learn(tmp_path / "parts", **how)
    again = [(path.name, path.stat().st_mtime_ns) for path in sorted(drawn.iterdir())]
    assert again[:2] == first
    assert len(again) == 3
    for name, value in whole.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name


def test_other_settings_begin_anew_and_leave_what_was_done(tmp_path: Path) -> None:
    learn(tmp_path, iterations=3)
    told: list[float] = []

    def note(stage: str, share: float) -> None:
        if stage == "training":
            told.append(share)

    learn(tmp_path, progress=note, iterations=4, seed=1)
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert len(list(tmp_path.glob("training-*"))) == 2
    told.clear()
    learn(tmp_path, progress=note, iterations=3)
    assert told == []


def test_what_a_teacher_drew_serves_all_of_its_students(tmp_path: Path) -> None:
    learn(tmp_path, iterations=2)
    stages: dict[str, list[float]] = {}
    learn(
        tmp_path,
        models(shaken(teacher())),
        lambda stage, share: stages.setdefault(stage, []).append(share),
        ("another",),
        iterations=2,
    )
    assert stages["training"] == [0.5, 1.0]
    assert len(list(tmp_path.glob("drawn-*"))) == 1
    assert len(list(tmp_path.glob("training-*"))) == 2


def test_zeros_of_pruning_stay_zeros(tmp_path: Path) -> None:
    student = shaken(teacher(), 0.1)
    prune_magnitude(student, "unet", 0.5, engine="histogram")
    zeros = {n: p.detach() == 0 for n, p in student.named_parameters() if p.ndim > 1}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
    before = distance(student)
    found = learn(tmp_path, models(student), objective="recover", iterations=30)
    assert distance(found.module) < before
    for name, parameter in found.module.named_parameters():
        if name in zeros:
            assert not bool(parameter[zeros[name]].any()), name
            assert bool(parameter[~zeros[name]].all()), name


def test_a_student_of_fewer_heads_learns(tmp_path: Path) -> None:
    student = teacher()
    for module in student.modules():
        if type(module).__name__ == "Attention":
            keep_heads(module, range(max(1, module.heads // 2)))
    before = distance(student)
    found = learn(tmp_path, models(student), objective="recover", iterations=30)
    assert distance(found.module) < before


def test_blocks_are_compared_where_both_have_them() -> None:
    one, other = teacher(), shaken(teacher())
    features = Features(one, other)
    x, states = torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, TEXT_WIDTH)
    for unet in (one, other):
        ask(unet, x, torch.tensor([5]), states)
    assert len(features.teacher) == 3
    whole = float(feature_loss(features))
    assert whole > 0
    features.student["mid_block"] = torch.zeros(1)
    assert float(feature_loss(features)) != whole
    features.student = features.teacher
    features.close()


def test_recomputing_activations_changes_nothing_but_memory(tmp_path: Path) -> None:
    plain, saving = (
        learn(
            tmp_path / str(checkpointing),
            models(shaken(teacher())),
            objective="recover",
            iterations=3,
            gradient_checkpointing=checkpointing,
        ).module
        for checkpointing in (False, True)
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not saving.is_gradient_checkpointing


def test_pictures_are_what_is_learnt_from(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "blue", "white")):
        Image.new("RGB", (70, 64), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} field", encoding="utf-8")
    student = shaken(teacher())
    before = distance(student)
    stages: list[str] = []
    settings = DistillSettings(
        objective="recover", iterations=20, batch=4, learning_rate=3e-3, warmup=2, device="cpu"
    )
    found = distill_unet(
        models(student, vae=True),
        Material(pictures=folder),
        settings,
        tmp_path / "work",
        progress=lambda stage, share: stages.append(stage),
    )
    assert set(stages) == {"texts", "pictures", "training"}
    assert distance(found.module) < before


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    student = teacher()
    next(student.parameters()).fill_(float("nan"))
    with pytest.raises(SdvinoError, match="no number after 0 iterations; lower the learning rate"):
        learn(tmp_path, models(student), objective="recover")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    found = learn(tmp_path, iterations=2)
    path = found.folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SdvinoError, match=r"checkpoint\.safetensors is damaged"):
        learn(tmp_path, iterations=2)


def test_students_and_material_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(teacher())
    other.register_to_config(cross_attention_dim=768)
    with pytest.raises(RequestError, match=r"attends to text 768 wide and its teacher .* 128 wide"):
        learn(tmp_path, models(other))
    with pytest.raises(RequestError, match="no prompts to learn from"):
        Material(prompts=("", " "))
    with pytest.raises(RequestError, match="do not divide"):
        learn(tmp_path, objective="steps", teacher_steps=6, student_steps=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no CUDA device here"):
        learn(tmp_path, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_a_student_learns(tmp_path: Path) -> None:
    student = shaken(teacher())
    before = distance(student)
    found = learn(tmp_path, models(student), objective="recover", iterations=60, device="cuda")
    assert distance(found.module) < 0.7 * before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "copy"}, "Unknown objective 'copy'"),
        ({"device": "tpu"}, "Unknown device 'tpu'"),
        ({"iterations": 0}, "iterations is 0; give a whole number from 1"),
        ({"batch": -1}, "batch is -1"),
        ({"student_steps": 3}, "20 steps of the teacher cannot be shared out over 3"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"ema": 1.0}, "ema is 1"),
        ({"minutes": 0.0}, "minutes is 0"),
        ({"seed": -1}, "cannot be negative"),
        ({"guidance_scale": 1000.0}, "guidance_scale is 1000"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        DistillSettings(**given)
