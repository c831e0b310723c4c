"""Losses are what the papers say, on models whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdvino.train.distillation.noise_levels import NoiseLevels
from sdvino.train.distillation.objectives import (
    Batch,
    Consistency,
    FoldGuidance,
    FollowTrajectories,
)
from sdvino.train.distillation.pool import Pool, Texts, draw_trajectories
from tests.train.distillation.students import SCHEDULER

LEVELS = NoiseLevels(SCHEDULER)
TEXTS = Texts(torch.tensor([1.0, 2.0]).half()[:, None, None], torch.zeros(1, 1))
SHAPE = (4, 2, 2)


class Sees(torch.nn.Module):  # type: ignore[misc]
    """Sees the same picture in whatever it is given: ``scale`` times what it is told."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Any, t: Any, encoder_hidden_states: Any, return_dict: bool) -> Any:
        a, s = LEVELS.split(t)
        return ((a * x - self.scale * encoder_hidden_states.mean((1, 2))[:, None, None, None]) / s,)


def batch(size: int = 8) -> Batch:
    return Batch(np.random.default_rng(0), torch.Generator().manual_seed(0), size, "cpu")


def ways(folder: Path, *, steps: int, kept: int, guidance_scale: float = 3.0) -> Any:
    return draw_trajectories(
        Sees(1.0),
        LEVELS,
        TEXTS,
        folder,
        shape=SHAPE,
        count=5,
        steps=steps,
        kept=kept,
        guidance_scale=guidance_scale,
        seed=0,
        device="cpu",
        progress=lambda share: None,
    )


def test_the_teacher_draws_what_guidance_makes_it_see(tmp_path: Path) -> None:
    found = ways(tmp_path / "few", steps=4, kept=4)
    assert found.x.shape == (5, 5, *SHAPE)
    assert found.text.tolist() == [0, 1, 0, 1, 0]
    for x, text in zip(found.pool.latents, found.text.tolist(), strict=True):
        torch.testing.assert_close(x, torch.full(SHAPE, 3.0 * (1 + text)))  # u = 0: 3 c
    # A model that always sees the same goes straight, in however many steps.
    many = ways(tmp_path / "many", steps=20, kept=4)
    torch.testing.assert_close(many.x, found.x, rtol=1e-3, atol=1e-3)
    assert found.x[:, 0].std() == pytest.approx(1.0, abs=0.3)


def test_who_sees_where_the_way_leads_has_nothing_to_learn(tmp_path: Path) -> None:
    student, average = Sees(3.0), Sees(3.0)
    follow = FollowTrajectories(
        Sees(1.0), LEVELS, TEXTS, trajectories=ways(tmp_path, steps=20, kept=4), steps=4
    )
    assert float(follow.loss(student, average, batch())) < 1e-4
    assert set(follow.parts) == {"step 1", "step 2", "step 3", "step 4"}
    pool = Pool(torch.randn(5, *SHAPE), torch.tensor([0, 1, 0, 1, 0]))
    consistent = Consistency(
        Sees(1.0), LEVELS, TEXTS, pool=pool, steps=4, teacher_steps=20, guidance_scale=3.0
    )
    assert float(consistent.loss(student, average, batch(20))) < 1e-3
    assert float(consistent.loss(Sees(1.0), average, batch(20))) > 1.0


def test_an_error_counts_by_the_noise_it_is_seen_in(tmp_path: Path) -> None:
    follow = FollowTrajectories(
        Sees(1.0), LEVELS, TEXTS, trajectories=ways(tmp_path, steps=4, kept=4), steps=4
    )
    one = Batch(np.random.default_rng(0), torch.Generator(), 400, "cpu")
    follow.loss(Sees(2.0), Sees(2.0), one)
    for index, t in enumerate(LEVELS.grid(4)[:-1]):
        _, s = LEVELS.split(torch.tensor([t]))
        # 3 c is right and 2 c is seen, where c is 1 or 2: 1 or 4, the first for three ways of five.
        expected = (0.6 * 1 + 0.4 * 4) / float(s) ** 2
        assert float(follow.parts[f"step {index + 1}"]) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("scale", "error"), [(3.0, 0.0), (1.0, 1.0)])
def test_guidance_is_what_the_student_should_do_alone(scale: float, error: float) -> None:
    pool = Pool(torch.randn(5, *SHAPE), torch.tensor([0, 1, 0, 1, 0]))
    fold = FoldGuidance(Sees(1.0), LEVELS, TEXTS, pool=pool, guidance_scale=3.0)
    found = float(fold.loss(Sees(scale), Sees(scale), batch()))
    assert (found < 1e-6) if error == 0 else (found > error)


def test_a_batch_is_told_nothing_as_often_as_asked() -> None:
    pool = Pool(torch.randn(5, *SHAPE), torch.zeros(5, dtype=torch.int64))
    fold = FoldGuidance(Sees(1.0), LEVELS, TEXTS, pool=pool, guidance_scale=3.0)
    told = fold._told(torch.zeros(4000, dtype=torch.int64), batch(4000), 0.1)
    assert float((told == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
