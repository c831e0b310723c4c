"""A distillation from beginning to end: what is learnt from is made, then the student learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdvino.compress.prompts import evenly
from sdvino.errors import RequestError
from sdvino.runtime.memory import peak_memory
from sdvino.train.distillation.loop import Trainer
from sdvino.train.distillation.models import Models, check_fits, choose_device, is_large, place
from sdvino.train.distillation.noise_levels import NoiseLevels
from sdvino.train.distillation.objectives import (
    Consistency,
    Features,
    FoldGuidance,
    FollowTrajectories,
    Objective,
    Recover,
)
from sdvino.train.distillation.pictures import find_pictures
from sdvino.train.distillation.pool import (
    Pool,
    Texts,
    Trajectories,
    draw_trajectories,
    make_pool,
    make_texts,
    unique_texts,
)
from sdvino.train.distillation.settings import USUAL_GUIDANCE, DistillSettings
from sdvino.train.distillation.store import stage_folder

#: Called with the stage (texts, pictures, drawing, training) and the share of it done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is learnt from: prompts, which the teacher draws, or pictures with captions."""

    prompts: tuple[str, ...] = ()
    pictures: Path | None = None

    def __post_init__(self) -> None:
        if self.pictures is None and not any(prompt.strip() for prompt in self.prompts):
            raise RequestError(
                "There are no prompts to learn from; give at least one, or pictures with captions."
            )


@dataclass(slots=True)
class Distilled:
    """What came out."""

    #: The student, float32, on the CPU, changed in place.
    module: Any
    #: Figures for people and for JSON.
    figures: dict[str, Any] = field(default_factory=dict)
    #: Where loss.jsonl stands.
    folder: Path = Path()


def distill_unet(
    models: Models,
    material: Material,
    settings: DistillSettings,
    work: Path,
    *,
    origin: Sequence[Any] = (),
    student_origin: Sequence[Any] = (),
    guidance_scale: float = USUAL_GUIDANCE,
    progress: Progress = lambda stage, share: None,
) -> Distilled:
    """Let ``models.student`` learn from ``models.teacher``; see `DistillSettings`.

    What takes time is kept in ``work``, and the same call goes on from it. ``origin`` is what
    JSON holds and tells the teacher from others, ``student_origin`` the student: what the teacher
    draws serves all of its students. ``guidance_scale`` is the teacher's where
    the settings give none.
    Raises RequestError for a student that does not fit, and KeyboardInterrupt after Ctrl-C, when
    all that was done is in ``work``.
    """
    check_fits(models.teacher.config, models.student.config)
    device = choose_device(settings.device)
    levels = NoiseLevels(models.scheduler, device)
    if settings.guidance_scale is not None:
        guidance_scale = settings.guidance_scale
    source = _Source(models, material, settings, work, list(origin), guidance_scale, progress)
    models.teacher = place(models.teacher, device).eval().requires_grad_(False)
    made = source.make(levels, device)
    models.text_encoder = models.vae = None  # their memory is the training's
    student = place(models.student, device)
    objective = _objective(settings, models.teacher, student, levels, made, guidance_scale)
    checkpointing = settings.gradient_checkpointing
    if is_large(student) if checkpointing is None else checkpointing:
        student.enable_gradient_checkpointing()
    told = [*source.key, list(student_origin), _training(settings), guidance_scale]
    folder = stage_folder(work, "training", *told)
    trainer = Trainer(student, settings, folder, device)
    try:
        module = trainer.run(objective, lambda share: progress("training", share))
    finally:
        if isinstance(objective, Recover):
            objective.features.close()
    student.disable_gradient_checkpointing()
    student.load_state_dict(module.state_dict())
    figures = {
        "objective": settings.objective,
        "guidance_scale": guidance_scale,
        "iterations": trainer.iteration,
        "batch": settings.batch,
        "training_seconds": round(trainer.seconds, 1),
        "device": device.type,
    }
    peak = peak_memory()
    if peak is not None:
        figures["peak_memory_bytes"] = peak
    return Distilled(student.to("cpu").eval().requires_grad_(False), figures, folder)


@dataclass(slots=True)
class _Made:
    texts: Texts
    pool: Pool
    trajectories: Trajectories | None


@dataclass(slots=True)
class _Source:
    """Makes what is learnt from."""

    models: Models
    material: Material
    settings: DistillSettings
    work: Path
    origin: list[Any]
    guidance_scale: float
    progress: Progress

    @property
    def key(self) -> list[Any]:
        """Return what tells this material from another."""
        pictures = self.material.pictures
        folder = None if pictures is None else str(pictures.absolute())
        return [*self.origin, list(self.material.prompts), folder]

    def make(self, levels: NoiseLevels, device: Any) -> _Made:
        """Encode or draw it, or read what an earlier run made."""
        entries = []
        captions = list(self.material.prompts)
        if self.material.pictures is not None:
            entries = find_pictures(self.material.pictures)
            captions = [entry.caption for entry in entries]
        drawn = not entries or self.settings.objective == "steps"
        unique, indices = unique_texts(captions)
        if drawn:
            unique = evenly(unique, self.settings.drawn)
        texts = make_texts(
            self.models,
            unique,
            stage_folder(self.work, "texts", *self.origin, unique),
            device,
            lambda share: self.progress("texts", share),
        )
        if drawn:
            trajectories = self._draw(levels, texts, [*self.origin, unique], device)
            return _Made(texts, trajectories.pool, trajectories)
        pool = make_pool(
            self.models,
            entries,
            indices,
            stage_folder(self.work, "pictures", *self.key, [str(one.path) for one in entries]),
            device,
            lambda share: self.progress("pictures", share),
        )
        return _Made(texts, pool, None)

    def _draw(self, levels: NoiseLevels, texts: Texts, key: list[Any], device: Any) -> Trajectories:
        settings = self.settings
        kept = settings.student_steps if settings.objective == "steps" else 1
        how = [settings.drawn, settings.teacher_steps, kept, self.guidance_scale, settings.seed]
        return draw_trajectories(
            self.models.teacher,
            levels,
            texts,
            stage_folder(self.work, "drawn", *key, how),
            shape=self.models.latent_shape,
            count=settings.drawn,
            steps=settings.teacher_steps,
            kept=kept,
            guidance_scale=self.guidance_scale,
            seed=settings.seed,
            device=device,
            progress=lambda share: self.progress("drawing", share),
        )


def _objective(
    settings: DistillSettings,
    teacher: Any,
    student: Any,
    levels: NoiseLevels,
    made: _Made,
    guidance_scale: float,
) -> Objective:
    if settings.few_steps:
        levels.grid(settings.student_steps)
    if settings.objective == "steps":
        assert made.trajectories is not None
        return FollowTrajectories(
            teacher,
            levels,
            made.texts,
            trajectories=made.trajectories,
            steps=settings.student_steps,
        )
    if settings.objective == "consistency":
        return Consistency(
            teacher,
            levels,
            made.texts,
            pool=made.pool,
            steps=settings.student_steps,
            teacher_steps=settings.teacher_steps,
            guidance_scale=guidance_scale,
        )
    if settings.objective == "guidance":
        return FoldGuidance(
            teacher, levels, made.texts, pool=made.pool, guidance_scale=guidance_scale
        )
    return Recover(
        teacher,
        levels,
        made.texts,
        pool=made.pool,
        feature_weight=settings.feature_weight,
        features=Features(teacher, student),
    )


def _training(settings: DistillSettings) -> Mapping[str, Any]:
    """Return the settings that another training has."""
    without = ("device", "checkpoint_seconds", "gradient_checkpointing")
    return {name: value for name, value in asdict(settings).items() if name not in without}
