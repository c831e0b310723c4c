"""What a distillation is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.settings import check_choice

Objective = Literal["recover", "guidance", "steps", "consistency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
#: After these a picture takes a few steps of DDIM.
FEW_STEPS: tuple[Objective, ...] = ("steps", "consistency")
DEVICES = ("auto", "cpu", "cuda")
# Seconds of a forward pass of a large UNet, for telling how long a training in minutes is.
_SECONDS = 5.0
# What of a scheduler_config.json describes the process, rather than the way through it.
_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
#: Guidance of a teacher whose folder suggests none.
USUAL_GUIDANCE = 7.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How a student learns. Raises RequestError for settings that cannot be."""

    #: recover: the teacher's outputs, and those of its blocks (a pruned or low-rank student).
    #: guidance: in one evaluation what the teacher does in two, its guidance folded in.
    #: steps: from each of ``student_steps`` noise levels to the next, as the guided teacher goes.
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

    def check(self, scheduler: Mapping[str, Any]) -> None:
        """Raise RequestError where the steps do not suit a model of this scheduler_config.json."""
        train = SchedulerConfig.from_dict(dict(scheduler)).for_sampler("ddim").num_train_timesteps
        check_steps(self.teacher_steps, train)

    @property
    def few_steps(self) -> bool:
        """Tell whether the student is made for ``student_steps`` steps."""
        return self.objective in FEW_STEPS

    @property
    def drawing_evaluations(self) -> int:
        """Return how many forward passes of a picture the teacher draws with, from prompts."""
        return 2 * self.drawn * self.teacher_steps

    @property
    def evaluations(self) -> int:
        """Return how many forward passes of a picture everything takes, about."""
        # Backward is as long as two of them; the teacher's own.
        each = {"recover": 4, "guidance": 5, "steps": 3, "consistency": 6}[self.objective]
        iterations = self.iterations
        if self.minutes is not None:
            iterations = max(1, round(60 * self.minutes / (_SECONDS * self.batch * each)))
        return self.drawing_evaluations + iterations * self.batch * each

    def scheduler_after(self, scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the scheduler_config.json that the student is used with."""
        return few_step_scheduler(scheduler) if self.few_steps else scheduler

    def suggested_after(self) -> dict[str, Any]:
        """Return what the student suggests in its teacher's place."""
        if self.few_steps:
            steps = self.student_steps
            return {"num_inference_steps": steps, "guidance_scale": 1.0, "scheduler": "ddim"}
        return {"guidance_scale": 1.0} if self.objective == "guidance" else {}


def check_steps(steps: int, train: int) -> None:
    """Raise RequestError unless ``steps`` divide ``train`` timesteps: each ends at another."""
    if train % steps:
        raise RequestError(
            f"{steps} steps do not divide the model's {train} timesteps evenly; give a number that"
            " does, such as 4 or 20."
        )


def few_step_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler_config.json of a student of few steps: DDIM on the very timesteps.

    Its steps are trailing, each ends where the next begins, and the last at the picture.
    """
    return {
        **{name: scheduler[name] for name in _PROCESS if scheduler.get(name) is not None},
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


# Texts and pictures: some percent of the whole, whatever the rest is.
_MATERIAL = 0.03


def whole(
    settings: DistillSettings, progress: Callable[[float], None]
) -> Callable[[str, float], None]:
    """Return a progress of stages that tells ``progress`` the share of the whole that is done."""
    drawing = settings.drawing_evaluations / settings.evaluations
    spans = {
        "texts": (0.0, _MATERIAL),
        "pictures": (_MATERIAL, 2 * _MATERIAL),
        "drawing": (_MATERIAL, _MATERIAL + (1 - _MATERIAL) * drawing),
        "training": (_MATERIAL + (1 - _MATERIAL) * drawing, 1.0),
    }

    def show(stage: str, share: float) -> None:
        start, end = spans[stage]
        progress(start + (end - start) * share)

    return show
