"""The pass `distill`: the UNet, as earlier passes left it, learns from the source's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdvino.compress.passes import Context, Outcome, Share, SourcePass
from sdvino.compress.prompts import check_prompts, evenly
from sdvino.errors import RequestError
from sdvino.train.calls import outputs_of, relative_error
from sdvino.train.distillation.pictures import find_pictures
from sdvino.train.distillation.settings import DistillSettings, Objective

if TYPE_CHECKING:
    from sdvino.nets.structure import Structure

# Calls that the distance from the teacher is measured on.
_SAMPLES = 4
_OF_THE_ROW = ("component", "prompts", "pictures")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(SourcePass):
    """Let the UNet learn from what it was: see `DistillSettings`, whose defaults these take."""

    kind: ClassVar[str] = "distill"

    objective: Objective | None = None
    iterations: int | None = None
    minutes: float | None = None
    batch: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    ema: float | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    student_steps: int | None = None
    teacher_steps: int | None = None
    drawn: int | None = None
    feature_weight: float | None = None
    gradient_checkpointing: bool | None = None
    device: str | None = None
    #: Prompts that the source draws; none: those that the model is calibrated on.
    prompts: tuple[str, ...] = ()
    #: A folder of pictures with captions, instead.
    pictures: str | None = None

    def __post_init__(self) -> None:
        SourcePass.__post_init__(self)
        if self.component != "unet":
            raise RequestError(f"distill trains the unet alone; take {self.component} out of it.")
        if self.iterations is not None and self.minutes is not None:
            raise RequestError("distill takes iterations or minutes; give one of them.")
        if self.pictures is not None and self.prompts:
            raise RequestError("distill learns from prompts or from pictures; give one of them.")
        if self.prompts:
            check_prompts(self.prompts)
        self.settings()

    def settings(self) -> DistillSettings:
        """Return the settings; raises RequestError for some that cannot be."""
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return DistillSettings(
            **{k: v for k, v in given.items() if v is not None and k not in _OF_THE_ROW}
        )

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        settings = self.settings()
        steps = f" {settings.student_steps}" if settings.few_steps else ""
        return f"{self.kind} {settings.objective}{steps}"

    def told(self) -> dict[str, Any]:
        """Return the settings for people and for JSON: of paths the name alone."""
        found = SourcePass.told(self)
        if self.pictures is not None:
            found["pictures"] = Path(self.pictures).name
        return {name: value for name, value in found.items() if value != []}

    @property
    def needs_origin(self) -> bool:
        """Tell that it learns from the source as it was."""
        return True

    def check(self, scheduler: Mapping[str, Any]) -> None:
        """Raise RequestError for steps that do not suit the source, and missing pictures."""
        self.settings().check(scheduler)
        if self.pictures is not None:
            find_pictures(Path(self.pictures))

    @property
    def evaluations(self) -> int:
        """Return how often the UNet is run, forward passes of one picture."""
        return self.settings().evaluations

    def scheduler_after(self, scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the scheduler_config.json that the student is used with."""
        return self.settings().scheduler_after(scheduler)

    def suggested_after(self) -> Mapping[str, Any]:
        """Return what the student suggests in the source's place."""
        return self.settings().suggested_after()

    def run(self, module: Any, structure: Structure, around: Context, progress: Share) -> Outcome:
        """Train ``module`` in place; see `SourcePass.run`."""
        from sdvino.train.distillation.engine import Material, distill_unet
        from sdvino.train.distillation.models import Models
        from sdvino.train.distillation.settings import whole

        origin = around.origin
        if origin is None:
            raise RequestError("distill needs the source that it learns from; use sdvino distill.")
        pictures = None if self.pictures is None else Path(self.pictures)
        settings = self.settings()
        teacher, samples = origin.load("unet"), evenly(around.inputs, _SAMPLES)
        references = outputs_of(teacher, samples)
        before = round(relative_error(outputs_of(module, samples), references), 5)
        found = distill_unet(
            Models(
                teacher=teacher,
                student=module,
                text_encoder=origin.load("text_encoder"),
                tokenizer=origin.tokenizer,
                scheduler=origin.scheduler,
                vae=None if pictures is None else origin.load("vae"),
            ),
            Material(prompts=self.prompts or origin.prompts, pictures=pictures),
            settings,
            origin.work,
            origin=[origin.key],
            student_origin=[origin.passed_key],
            guidance_scale=origin.guidance_scale,
            progress=whole(settings, progress),
        )
        if references:
            after = relative_error(outputs_of(found.module, samples), references)
            found.figures["distance_from_teacher"] = {"before": before, "after": round(after, 5)}
        return Outcome(found.module, structure, found.figures)
