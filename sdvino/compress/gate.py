"""The quality gate: a compressed folder is held against the float one, and mended until it passes.

What fails is mended where it costs least: the layers that a measurement finds most sensitive go
back to float, in growing steps; when that takes too much or too long, the next milder recipe is
taken. Nothing here knows how a folder is compressed: `Recompress` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.compare import (
    FIRST_SEED,
    Comparison,
    Reference,
    compare,
    make_request,
    opened,
    run_float,
    time_folder,
)
from sdvino.compress.float_layers import restored
from sdvino.compress.quiet import quiet
from sdvino.compress.recipes import Recipe
from sdvino.compress.sensitivity import Sensitivity, measure_sensitivity
from sdvino.compress.thresholds import (
    GatePlan,
    GateSettings,
    Thresholds,
    components_only,
    default_thresholds,
    fit_plan,
)
from sdvino.compress.verdict import Remedy, Verdict, find_failures, median, share_to_reach, to_blame
from sdvino.errors import RequestError, SdvinoError
from sdvino.folder.index import ModelFolder, Suggested
from sdvino.graph.saving import read_ir, save_ir
from sdvino.graph.upsampling import split_like

#: Called with what is being done and the share of it done, 0 to 1.
Progress = Callable[[str, float], None]
#: Compresses the named components of the folder anew, from the float IR, as the recipe says.
Recompress = Callable[[Recipe, Sequence[str]], None]

#: The name of the gate's part in `Progress`.
PART = "gate"
#: A UNet whose prediction is further than this from the noise that was added has learnt nothing.
_UNTRAINED = 0.8
#: Inputs that the layers of a component are measured on.
_SAMPLES = 4
#: Share of what time is left that finding the sensitive layers may take, and, where nothing failed
#: and it is only for the report, seconds that it may take at most.
_SEARCH_SHARE, _REPORT_SECONDS = 0.4, 60.0
#: When more of a component's layers than this share must go back to float, the recipe is wrong.
_MOST_FLOAT = 0.5
#: The error aimed at, as a share of what would just pass.
_MARGIN = 0.9
_PARTS_OF_PROGRESS = (0.35, 0.65)


@dataclass(slots=True, kw_only=True)
class Gate:
    """Compares a folder with the float one, and mends it until it passes: `run` gives the verdict.

    Takes about the minutes that ``settings`` allow; a recipe fallen back to is compared even when
    they are over. Raises RequestError where there are no prompts.
    """

    #: Whole model folders; sdvino.json is not needed yet.
    float_folder: Path
    folder: Path
    #: What ``folder`` is compressed with.
    recipe: Recipe
    recompress: Recompress
    #: Texts that calibration did not see.
    prompts: tuple[str, ...]
    settings: GateSettings = field(default_factory=GateSettings)
    #: None takes the defaults for the recipe, anew for each milder one.
    thresholds: Thresholds | None = None
    #: Steps, guidance and sampler of the pictures.
    suggested: Suggested = field(default_factory=Suggested)
    #: A UNet that would take more bytes is run in pieces, which takes longer; None: as it is.
    max_memory: int | None = None
    progress: Progress = lambda what, share: None
    #: Told, in a line each, what the comparison will cost and what is done about failures.
    say: Callable[[str], None] = lambda line: None
    asked: str = field(init=False)
    began: float = field(default_factory=time.monotonic)
    estimated: float | None = None
    plan: GatePlan | None = None
    reference: Reference | None = None
    trained: bool | None = None
    history: list[Remedy] = field(default_factory=list)
    sensitivity: dict[str, Sensitivity] = field(default_factory=dict)
    #: Component to how many of its most sensitive groups are in float.
    restored: dict[str, int] = field(default_factory=dict)
    float_layers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked = self.recipe.name
        self.prompts = tuple(dict.fromkeys(text.strip() for text in self.prompts if text.strip()))
        if not self.prompts:
            raise RequestError("There are no prompts to compare pictures on; give at least one.")

    def run(self) -> Verdict:
        """Return the verdict; ``verdict.recipe`` is what the folder has in the end.

        When the float folder cannot be run, or there is no time for the least, ``passed`` is None
        and ``note`` says why.
        """
        components = tuple(ModelFolder.open(self.float_folder).components)
        thresholds = self._thresholds(components)
        if all(self.recipe.treatment(name) == "fp16" for name in components):
            return self._verdict(None, thresholds, None, (), "nothing is compressed")
        try:
            if not self._run_float():
                return self._verdict(None, thresholds, None, (), self._too_long())
        except SdvinoError as error:
            note = f"the uncompressed pipeline cannot be run here: {error}"
            return self._verdict(None, thresholds, None, (), note)
        while True:
            thresholds = self._thresholds(components)
            comparison = self._compare()
            failures = find_failures(comparison, thresholds, pictures=self.trained is True)
            self._note_result(comparison)
            if not failures or not self.trained:
                break
            if not self._mend(comparison, thresholds, failures):
                break
            if all(self.recipe.treatment(name) == "fp16" for name in components):
                comparison, failures = self._compare(), ()
                self._note_result(comparison)
                break
        self._measure_for_report(comparison)
        self.progress(PART, 1.0)
        return self._verdict(not failures, thresholds, comparison, failures, None)

    # --- measuring

    def _run_float(self) -> bool:
        """Run the float folder; returns False when there is not even time for the least."""
        kind = ModelFolder.open(self.float_folder).kind
        guidance = self.suggested.guidance_scale
        guidance = kind.guidance_scale if guidance is None else guidance
        steps = self.suggested.num_inference_steps
        steps = kind.num_inference_steps if steps is None else steps
        options: dict[str, Any] = {"guidance": guidance, "scheduler": self.suggested.scheduler}
        with opened(self.float_folder, self.max_memory) as (pipe, taps):
            first = make_request(self.float_folder, self.prompts[:1], steps=steps, **options)
            speed = time_folder(pipe, first)
            plan = fit_plan(
                speed, prompts=len(self.prompts), steps=steps, minutes=self.settings.minutes
            )
            self.estimated = speed.seconds(plan) / 60
            self.plan = plan
            if self.estimated > self.settings.minutes:
                return False
            self.say(_announce(plan, speed.seconds(plan), self.settings.minutes))
            request = make_request(
                self.float_folder, self.prompts[: plan.pictures], steps=plan.steps, **options
            )
            share = _PARTS_OF_PROGRESS[0]
            self.reference = run_float(
                pipe, taps, request, plan, lambda done: self.progress(PART, share * done)
            )
        self.trained = self.reference.denoising_error <= _UNTRAINED
        if not self.trained:
            self.plan = components_only(plan)
            self.say("these weights draw nothing yet (random?): components alone are compared")
        return True

    def _compare(self) -> Comparison:
        assert self.reference is not None
        assert self.plan is not None
        low, high = _PARTS_OF_PROGRESS
        return compare(
            self.folder,
            self.reference,
            self.plan,
            time.monotonic,
            lambda done: self.progress(PART, low + (high - low) * done),
            self.max_memory,
        )

    def _samples(self, component: str) -> list[dict[str, NDArray[Any]]]:
        """Return inputs of the saved IR of ``component``, spread over what was recorded."""
        assert self.reference is not None
        if component == "unet":
            # An odd stride takes predictions with and without the prompt by turns.
            calls = [dict(item.call.inputs) for item in self.reference.predictions]
            calls = calls[:: (len(calls) // _SAMPLES) | 1]
        else:
            calls = [dict(call.inputs) for call in self.reference.calls.get(component, [])]
        folder = ModelFolder.open(self.float_folder)
        samples = calls[:_SAMPLES]
        for sample in samples:
            if component == "vae_decoder":
                shift = np.float32(0.0 if folder.shift_factor is None else folder.shift_factor)
                scale = np.float32(folder.scaling_factor)
                sample["latent_sample"] = sample["latent_sample"] / scale + shift
            elif component == "vae_encoder":
                levels = np.asarray(sample["sample"], np.float32).transpose(0, 3, 1, 2)
                sample["sample"] = levels / np.float32(127.5) - np.float32(1.0)
        return samples

    def _measure_layers(self, component: str, seconds: float) -> Sensitivity | None:
        """Return the layers of ``component`` by sensitivity, or None where that cannot be had."""
        if component not in self.sensitivity:
            files = [f / component / "openvino_model.xml" for f in (self.float_folder, self.folder)]
            try:
                self.sensitivity[component] = measure_sensitivity(
                    component,
                    files[0],
                    files[1],
                    self._samples(component),
                    seconds=seconds,
                    max_memory=self.max_memory,
                )
            except (SdvinoError, RuntimeError):  # no time, or graphs that do not match
                return None
        return self.sensitivity[component]

    def _measure_for_report(self, comparison: Comparison) -> None:
        """Find the UNet's sensitive layers also when nothing failed, as far as time allows."""
        if self.trained and "unet" not in self.sensitivity and not self.fell_back:
            left = self._left()
            self._measure_layers("unet", min(_REPORT_SECONDS, _SEARCH_SHARE * left))

    # --- mending

    def _mend(
        self, comparison: Comparison, thresholds: Thresholds, failures: tuple[str, ...]
    ) -> bool:
        """Put layers back to float, or take a milder recipe; returns False when nothing is left."""
        component = to_blame(comparison, thresholds)
        if self._left() > comparison.seconds and self._restore(
            component, share_to_reach(comparison, thresholds, component), failures
        ):
            return True
        milder = self.recipe.milder()
        if milder is None:
            return False
        self.say(f"{'; '.join(failures)}: falling back to the recipe {milder.name}")
        self.history.append(Remedy(action="milder recipe", what=(milder.name,), because=failures))
        changed = [
            name
            for name in ModelFolder.open(self.folder).components
            if milder.treatment(name) != self.recipe.treatment(name) or name in self.float_layers
        ]
        self.recipe = milder
        self.restored, self.float_layers, self.sensitivity = {}, {}, {}
        self.recompress(milder, changed)
        return True

    def _restore(self, component: str, goal: float, failures: tuple[str, ...]) -> bool:
        """Put the most sensitive layers of ``component`` back to float; False when it is no use."""
        sensitivity = self._measure_layers(component, _SEARCH_SHARE * self._left())
        if sensitivity is None:
            return False
        before = self.restored.get(component, 0)
        count = max(sensitivity.most_sensitive(_MARGIN * goal), 2 * before, before + 1)
        chosen = [node for layer in sensitivity.layers[:count] for node in layer.nodes]
        total = sum(len(layer.nodes) for layer in sensitivity.layers)
        if count > len(sensitivity.layers) or len(chosen) > max(1.0, _MOST_FLOAT * total):
            return False
        already = set(self.float_layers.get(component, ()))
        fresh = [node for node in chosen if node not in already]
        try:
            self._write_restored(component, fresh)
        except (SdvinoError, RuntimeError):
            return False
        self.restored[component] = count
        self.float_layers[component] = tuple(chosen)
        self.recipe = self.recipe.with_float_layers(component, chosen)
        self.say(
            f"{'; '.join(failures)}: {len(chosen)} of {total} layers of the {component}"
            " go back to float"
        )
        self.history.append(
            Remedy(action="float layers", component=component, what=tuple(fresh), because=failures)
        )
        return True

    def _write_restored(self, component: str, layers: Sequence[str]) -> None:
        """Put the float ``layers`` into the folder's IR; its calibration stays as it is."""
        xml = self.folder / component / "openvino_model.xml"
        with quiet():
            base = read_ir(self.float_folder / component / "openvino_model.xml")
            compressed = read_ir(xml)
            split_like(base, compressed)
            save_ir(restored(base, compressed, layers), xml)

    def _note_result(self, comparison: Comparison) -> None:
        """Add what was measured to the last remedy."""
        if self.history and self.history[-1].error is None:
            last = self.history[-1]
            error = comparison.components.get(last.component if last.component else "unet")
            self.history[-1] = replace(last, psnr=median(comparison.psnr), error=error)

    # --- the rest

    @property
    def fell_back(self) -> bool:
        """Whether the recipe is a milder one than was asked for."""
        return self.recipe.name != self.asked

    def _left(self) -> float:
        """Return the seconds left."""
        return 60 * self.settings.minutes - (time.monotonic() - self.began)

    def _thresholds(self, components: tuple[str, ...]) -> Thresholds:
        if self.thresholds is not None:
            return self.thresholds
        return default_thresholds(self.recipe, components, min_psnr=self.settings.min_psnr)

    def _too_long(self) -> str:
        return (
            f"the least comparison takes about {self.estimated:.0f} min here;"
            f" allow it with --gate-minutes {int(self.estimated or 0) + 1}"
        )

    def _verdict(
        self,
        passed: bool | None,
        thresholds: Thresholds,
        comparison: Comparison | None,
        failures: tuple[str, ...],
        note: str | None,
    ) -> Verdict:
        reference = self.reference
        return Verdict(
            passed=passed,
            recipe=self.recipe,
            asked=self.asked,
            thresholds=thresholds,
            note=self._outcome(failures) if note is None else note,
            failures=failures,
            comparison=comparison,
            trained=self.trained,
            denoising_error=None if reference is None else reference.denoising_error,
            plan=self.plan,
            prompts=() if self.plan is None else self.prompts[: self.plan.pictures],
            first_seed=FIRST_SEED,
            guidance_scale=None if reference is None else reference.request.guidance_scale,
            history=tuple(self.history),
            sensitivity=tuple(self.sensitivity.values()),
            float_layers=dict(self.float_layers),
            estimated_minutes=self.estimated,
            minutes=(time.monotonic() - self.began) / 60,
            float_pictures=() if reference is None else tuple(reference.pictures),
        )

    def _outcome(self, failures: tuple[str, ...]) -> str:
        parts = []
        if self.fell_back:
            parts.append(f"{self.asked} did not pass, so the folder is {self.recipe.name}")
        if self.float_layers:
            count = sum(map(len, self.float_layers.values()))
            names = ", ".join(self.float_layers)
            parts.append(f"{count} sensitive layers ({names}) went back to float")
        if not self.trained:
            parts.append("the weights draw nothing (random?), so only components were compared")
        parts += failures
        return "; ".join(parts)


def _announce(plan: GatePlan, seconds: float, minutes: float) -> str:
    what = "pictures" if plan.pictures > 1 else "picture"
    took = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return (
        f"comparing {plan.pictures} {what} of {plan.steps} steps with the uncompressed pipeline:"
        f" about {took} (mending what fails may take more, up to {minutes:g} min together)"
    )
