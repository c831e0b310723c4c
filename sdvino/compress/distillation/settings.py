"""What a distillation is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sdvino.errors import RequestError
from sdvino.settings import check_choice

Objective = Literal["recover", "guidance", "steps", "consistency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
#: After these a picture takes a few steps of DDIM.
FEW_STEPS: tuple[Objective, ...] = ("steps", "consistency")
DEVICES = ("auto", "cpu", "cuda")
#: Guidance of a teacher whose folder suggests none.
USUAL_GUIDANCE = 7.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How a student learns. Raises RequestError for settings that cannot be."""

    #: recover: the teacher's outputs, and those of its blocks (a pruned or low-rank student).
    #: guidance: in one evaluation what the teacher does in two, its guidance folded in.
    #: steps: from each of ``student_steps`` noise levels to the next, on the teacher's guided ways.
    #: consistency: the same, one step of the teacher at a time and the student's average beyond.
    objective: Objective = "recover"
    #: Updates of the student. The same settings give the same student on the CPU.
    iterations: int = 1000
    #: Time to train for, instead of ``iterations``.
    minutes: float | None = None
    batch: int = 16
    #: Of AdamW: it rises over ``warmup`` iterations and falls to zero along a cosine.
    learning_rate: float = 3e-4
    warmup: int = 50
    #: Decay of the running average of the weights, which is what is kept; 0: no average.
    ema: float = 0.99
    seed: int = 0
    #: The teacher's, where it is guided; None: what its folder suggests.
    guidance_scale: float | None = None
    #: Steps that the student shall take, and those that the teacher takes.
    student_steps: int = 4
    teacher_steps: int = 20
    #: Latents that the teacher draws from the prompts to learn from.
    drawn: int = 512
    #: recover: weight of the blocks' loss beside the output's.
    feature_weight: float = 1.0
    #: Recompute activations in the backward pass, for memory; None: for large UNets.
    gradient_checkpointing: bool | None = None
    device: str = "auto"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("device", self.device, DEVICES)
        whole = {"iterations": 10_000_000, "batch": 4096, "student_steps": 100, "drawn": 1_000_000}
        for name, most in {**whole, "teacher_steps": 1000}.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise RequestError(f"{name} is {value}; give a whole number from 1 to {most:,}.")
        if self.warmup < 0 or self.seed < 0:
            raise RequestError("warmup and seed cannot be negative; give whole numbers from 0 up.")
        for name, low, high in (
            ("learning_rate", 1e-9, 1.0),
            ("ema", 0.0, 0.999999),
            ("feature_weight", 0.0, 1e6),
            ("guidance_scale", 0.0, 100.0),
            ("minutes", 1e-3, 1e6),
            ("checkpoint_seconds", 0.0, 1e6),
        ):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and low <= number <= high):
                raise RequestError(f"{name} is {number:g}; give a number from {low:g} to {high:g}.")
        if self.teacher_steps % self.student_steps:
            raise RequestError(
                f"{self.teacher_steps} steps of the teacher cannot be shared out over"
                f" {self.student_steps} of the student; give a multiple."
            )
