"""A conversion under way: which steps are left, what they are made from, and their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sdvino.compress.recipes import Recipe
from sdvino.convert.estimate import Work
from sdvino.convert.export import spooled
from sdvino.convert.metadata import tool_versions, write_manifest
from sdvino.convert.open_source import Source
from sdvino.convert.processes import run_steps
from sdvino.convert.request import WorkPlan, recipe_from_plain, recipe_to_plain
from sdvino.convert.source_passes import export_key, history_of, pass_steps, scheduled_after
from sdvino.convert.state import STATE_FORMAT, Files, WorkFolder, describe_files, key_of
from sdvino.convert.steps import Progress, Step, group
from sdvino.errors import OutputError, RequestError
from sdvino.folder.index import ModelFolder

_log = logging.getLogger("sdvino")


class Conversion:
    """Runs what is not finished yet, in worker processes, and writes down what is."""

    def __init__(
        self,
        source: Source,
        plan: WorkPlan,
        suggested: Mapping[str, Any],
        work: WorkFolder,
        progress: Progress,
    ) -> None:
        """``plan`` says what was asked for; ``work`` what an earlier run has finished of it."""
        self.source = source
        self.plan = plan
        self.work = work
        self.suggested = suggested
        self._progress = progress
        self._quality: Mapping[str, Any] | None = None
        #: Whether a step was begun in this run.
        self.started = False
        self._origin = origin_of(plan)
        recipe = recipe_to_plain(plan.recipe)
        gate = None if plan.request.gate is None else asdict(plan.request.gate)
        self._asked = key_of(self._origin, recipe, asdict(plan.calibration), gate)
        self._whole = key_of(self._asked, asdict(plan.request), suggested)
        passed = work.verdict(self._asked)
        if passed is not None:
            self.plan = replace(plan, recipe=recipe_from_plain(passed["recipe"]))
            self._quality = passed["quality"]

    @property
    def gated(self) -> bool:
        """Tell whether the gate has passed already, in an earlier run."""
        return self._quality is not None

    @property
    def delivered(self) -> bool:
        """Tell whether an earlier run for the same request had put the model in place."""
        return self.work.was_delivered(self._whole)

    def steps(self) -> list[tuple[Step, str]]:
        """Return every step with the key of what it is made from, in order."""
        return steps_of(self.source, self.plan, self._origin)

    def left(self) -> list[Step]:
        """Return the steps that are not finished."""
        return [step for step, key in self.steps() if not self.work.finished(step.name, key)]

    def run(self) -> None:
        """Do every step that is not finished."""
        steps = list(self.steps())
        began = self.work.has_progress
        finished = set(self.work.keep_only({step.name: key for step, key in steps}))
        if began and finished:
            _log.warning(
                "Continuing an interrupted conversion: %d of %d steps are finished.",
                len(finished),
                len(steps),
            )
        elif began:
            _log.warning("An interrupted conversion here was of something else: starting anew.")
            self.work.start_anew()
        self._run([(step, key) for step, key in steps if step.name not in finished])

    def worth_keeping(self, error: BaseException) -> bool:
        """Tell whether what is finished helps the next run, after ``error``.

        A source found to be wrong while it is exported is no better next time.
        """
        wrong = isinstance(error, RequestError) and not isinstance(error, OutputError)
        if not (self.started and wrong):
            return True
        left = self.left()
        passes = [step for step, _ in self.steps() if step.kind == "pass"]
        if any(step not in left for step in passes):
            return True  # the next pass was wrong, which can be corrected
        return not any(step.kind in ("metadata", "export") for step in left)

    def recompress(self, recipe: Recipe, components: Sequence[str]) -> None:
        """Compress ``components`` again, as ``recipe`` has it; the recipe is the model's from here.

        Calibration runs again only when ``recipe`` quantizes a component that none did before.
        """
        self.plan = replace(self.plan, recipe=recipe)
        self.work.forget([f"compress {name}" for name in components])
        self._run(
            [(step, key) for step, key in self.steps() if not self.work.finished(step.name, key)]
        )

    def record_quality(self, quality: Mapping[str, Any]) -> None:
        """Take the gate's verdict on the model as it is now."""
        self._quality = quality
        self.work.record_verdict(
            self._asked, {"recipe": recipe_to_plain(self.plan.recipe), "quality": quality}
        )

    def finish(self, *, overwrite: bool) -> None:
        """Write the manifest, check the folder as a user would load it, and move it into place."""
        name = self.plan.request.name
        write_manifest(
            self.work.model,
            self.plan.components,
            source=self.source.name if name is None else name,
            family=self.source.family.name,
            recipe=self.plan.recipe,
            suggested=self.suggested,
            baked=self.plan.request.baking.to_manifest(),
            quality=self._quality,
            passes=history_of(self.work.path, self.plan.recipe),
            target=self.plan.request.target if _eight_bits(self.plan) else None,
            trained=_trains(self.plan),
        )
        ModelFolder.open(self.work.model)  # what we would refuse to run is not delivered
        self.work.deliver(self._whole, overwrite=overwrite)

    def _run(self, left: Sequence[tuple[Step, str]]) -> None:
        self.started = True
        keys = {step.name: key for step, key in left}
        self.work.prepare()
        self.plan.write(self.work.path)
        work = Work([step for step, _ in left], self.plan, self._progress)

        def finished(name: str, files: Files) -> None:
            self.work.record(name, keys[name], files)
            work.update(name, 1.0)

        for steps in group([step for step, _ in left]):
            run_steps(
                self.work.path, steps, progress=work.update, finished=finished, tick=work.tick
            )


def _eight_bits(plan: WorkPlan) -> bool:
    """Tell whether a component has activations in 8 bits."""
    return any(plan.recipe.component(name).quantizes_activations for name in plan.components)


def _trains(plan: WorkPlan) -> bool:
    """Tell whether torch and its libraries take part."""
    return plan.request.exporter != "sdvino" or bool(plan.recipe.passes)


def origin_of(plan: WorkPlan) -> str:
    """Return a digest of what every step depends on: the source, and the libraries."""
    request = plan.request
    files = [[str(path), describe_files(path)] for path in request.files]
    told = (asdict(request.baking), request.prediction_type)
    versions = tool_versions(trained=request.exporter != "sdvino")
    return key_of(STATE_FORMAT, versions, request.exporter, files, told)


def steps_of(source: Source, plan: WorkPlan, origin: str) -> list[tuple[Step, str]]:
    """Return the steps of a conversion, in order, with the key of what each is made from.

    A step that was finished under the same key need not be done again.
    """
    size = {ours: source.bytes_of(theirs) for ours, theirs in source.components.items()}
    described = scheduled_after(source, plan.recipe).configs["scheduler"]
    own = described == source.configs["scheduler"]
    steps = [(Step("metadata"), origin if own else key_of(origin, described))]
    steps += pass_steps(source, plan, origin)
    exported = {name: export_key(source, plan, name, origin) for name in plan.components}
    for name in plan.components:
        beside = spooled(source, name) if plan.request.exporter == "sdvino" else 0
        steps.append((Step("export", name, size[name], beside), exported[name]))
    changed = sorted(set(exported.values()) - {origin})
    calibration = key_of(origin, asdict(plan.calibration), plan.quantized, *changed)
    if plan.quantized:
        steps.append((Step("calibrate", "", size["unet"]), calibration))
    for name in plan.components:
        basis = calibration if name in plan.quantized else exported[name]
        key = key_of(basis, asdict(plan.recipe.component(name)), plan.request.target)
        steps.append((Step("compress", name, size[name]), key))
    return steps
