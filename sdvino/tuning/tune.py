"""Measuring a model on this machine, and choosing how to run it: the work of `sdvino tune`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from sdvino.errors import RequestError, SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.outputs import Array
from sdvino.runtime.component import Component
from sdvino.runtime.components import Components
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.guard import CANARY_TOLERANCE, problem_of
from sdvino.runtime.profile import TUNED_FIELDS, Fallback, TunedComponent
from sdvino.runtime.properties import normalize_device
from sdvino.settings import DeviceSettings, GuidanceMode, RunSettings
from sdvino.tuning.axes import Choice, axes, guidance_modes
from sdvino.tuning.search import Axis, Found, Trial, search
from sdvino.weights.numbers import relative_error

#: Component -> its part of the time that is left when its turn comes.
_SHARES = {"unet": 0.7, "vae_decoder": 0.7, "text_encoder": 1.0}
#: A timestep in the middle of the noise levels.
_TIMESTEP = 500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was found."""

    components: Mapping[str, TunedComponent]
    guidance_mode: GuidanceMode | None
    #: Component -> everything tried.
    trials: Mapping[str, tuple[Trial[Choice], ...]]
    complete: bool
    interrupted: bool


@dataclass(slots=True)
class _Progress:
    """What has been found so far."""

    components: dict[str, TunedComponent] = field(default_factory=dict)
    trials: dict[str, tuple[Trial[Choice], ...]] = field(default_factory=dict)
    guidance_mode: GuidanceMode | None = None
    complete: bool = True
    interrupted: bool = False


#: Called after each candidate's runs: component, what was measured, seconds left.
Report = Callable[[str, Trial[Choice], float], None]


def tune(
    folder: ModelFolder,
    *,
    seconds: float,
    width: int | None = None,
    height: int | None = None,
    devices: Sequence[str] = (),
    guided: bool = True,
    base: DeviceSettings | None = None,
    report: Report = lambda component, trial, left: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Find the fastest settings for the parts of ``folder``, in about so many ``seconds``.

    Pictures of ``width`` x ``height`` pixels (None: the model's size); ``devices`` limits the
    hardware, which is otherwise every CPU and GPU; ``guided`` also measures how the two predictions
    of guidance run best. ``base`` holds what is not tuned, such as the cache's folder. Ctrl-C ends
    it with what was found by then. Raises RequestError for a wrong request.
    """
    size = latent_size(folder, width, height)
    names = _devices(devices)
    facts = {name: device_facts(shared_core(), name) for name in names}
    start = replace(DeviceSettings() if base is None else base, device=names[0])
    deadline = clock() + seconds
    bench = Workbench(folder, size)
    done = _Progress()
    try:
        for name, share in _SHARES.items():
            if name == "text_encoder" and len(names) < 2:
                continue  # a thousandth of the time; its device is the only question
            ends = clock() + share * (deadline - clock())

            def time_left(ends: float = ends) -> float:
                return ends - clock()

            def told(trial: Trial[Choice], name: str = name) -> None:
                report(name, trial, deadline - clock())

            run = partial(search, measure=bench.measure(name), time_left=time_left, report=told)
            found = run(
                Choice(start), axes(name, facts, names, eight_bits=_eight_bits(folder, name))
            )
            _note(done, name, found)
            if name == "unet" and guided and found.seconds is not None and found.complete:
                _note_guidance(done, run(found.settings, [Axis("guidance", guidance_modes)]))
            if done.interrupted:
                break
    except KeyboardInterrupt:  # between two measurements
        done.complete, done.interrupted = False, True
    finally:
        bench.close()
    return Tuning(
        components=done.components,
        guidance_mode=done.guidance_mode,
        trials=done.trials,
        complete=done.complete,
        interrupted=done.interrupted,
    )


def _eight_bits(folder: ModelFolder, name: str) -> bool:
    """Return whether activations of a component are in 8 bits."""
    files = folder.components.get(name)
    return files is not None and files.ir.quantized


def latent_size(folder: ModelFolder, width: int | None, height: int | None) -> tuple[int, int]:
    """Return height and width in latents; raises RequestError for sides that do not divide."""
    factor = folder.vae_scale_factor
    sides = []
    for name, given, own in (("height", height, folder.height), ("width", width, folder.width)):
        side = own if given is None else given
        if side < factor or side % factor:
            raise RequestError(f"The {name} is {side}; give a multiple of {factor}.")
        sides.append(side // factor)
    return sides[0], sides[1]


def _devices(asked: Sequence[str]) -> list[str]:
    """Return hardware to measure on, the CPU first; raises DeviceError for what is not here."""
    available = shared_core().available_devices
    if asked:
        names = [normalize_device(name, available) for name in asked]
        for name in names:
            if name.partition(":")[0] in ("AUTO", "HETERO"):
                raise RequestError(f"{name} is no hardware; name devices, such as CPU and GPU.")
    else:
        names = [name for name in available if not name.startswith("NPU")]
    return sorted(dict.fromkeys(names), key=lambda name: name != "CPU")


def _note(done: _Progress, name: str, found: Found[Choice]) -> None:
    done.trials[name] = found.trials
    done.complete = done.complete and found.complete
    done.interrupted = done.interrupted or found.interrupted
    if found.seconds is not None and found.default_seconds is not None:
        done.components[name] = TunedComponent(
            settings=tuned_fields(found.settings.settings),
            seconds=found.seconds,
            default_seconds=found.default_seconds,
        )


def _note_guidance(done: _Progress, found: Found[Choice]) -> None:
    done.trials["unet"] += found.trials
    done.complete = done.complete and found.complete
    done.interrupted = done.interrupted or found.interrupted
    if sum(bool(trial.seconds) for trial in found.trials) > 1:  # otherwise nothing was compared
        done.guidance_mode = found.settings.guidance_mode


def still_valid(
    fallbacks: Mapping[str, Fallback], trials: Mapping[str, Sequence[Trial[Choice]]]
) -> dict[str, Fallback]:
    """Return those of ``fallbacks`` that ``trials`` have not asked anew.

    A device that was left for the CPU was wrong or slow in one evaluation, which is what tuning
    measures. That a precision overflowed shows with pictures alone.
    """
    asked = {
        (name, trial.candidate.settings.settings.device)
        for name, tried in trials.items()
        for trial in tried
        if trial.seconds and trial.problem is None
    }
    return {
        name: fallback
        for name, fallback in fallbacks.items()
        if fallback.device == fallback.from_device or (name, fallback.from_device) not in asked
    }


def tuned_fields(settings: DeviceSettings) -> dict[str, Any]:
    """Return what of ``settings`` a profile keeps: the device, and what is not left open."""
    return {name: value for name in TUNED_FIELDS if (value := getattr(settings, name)) is not None}


class Workbench:
    """Times one part of a model after another; the part measured last stays loaded."""

    def __init__(self, folder: ModelFolder, size: tuple[int, int]) -> None:
        self.folder = folder
        #: Height and width of the latents.
        self.size = size
        self._open: tuple[str, Choice] | None = None
        self._components: Components | None = None
        self._run: Callable[[], Mapping[str, Array]] | None = None
        #: Component -> what the first settings gave, to compare others with.
        self._references: dict[str, dict[str, Any]] = {}
        self._pool = ThreadPoolExecutor(2)

    def measure(self, name: str) -> Callable[[Choice], float]:
        """Return a function that times one run of the component ``name``.

        It raises SdvinoError where the device does not take the settings, or gives other numbers
        than the settings measured first.
        """

        def seconds(choice: Choice) -> float:
            if self._open != (name, choice):
                self._load(name, choice)
            assert self._run is not None
            started = time.perf_counter()
            self._run()
            return time.perf_counter() - started

        return seconds

    def close(self) -> None:
        """Unload what is loaded; nothing is measured any more."""
        self._release()
        self._pool.shutdown()

    def _release(self) -> None:
        self._open = self._run = None
        if self._components is not None:
            self._components.release()
            self._components = None

    def _load(self, name: str, choice: Choice) -> None:
        self._release()
        settings = choice.settings
        if choice.guidance_mode == "streams":
            settings = replace(settings, num_streams=2)
        self._components = Components(self.folder, RunSettings(components={name: settings}))
        batch = 2 if choice.guidance_mode == "batch" else 1
        component = self._component(name, batch)
        inputs = _inputs(component)

        def once() -> Mapping[str, Array]:
            return component.infer(inputs)

        def twice() -> Mapping[str, Array]:
            once()
            return once()

        def together() -> Mapping[str, Array]:
            first, second = (self._pool.submit(once) for _ in range(2))
            first.result()
            return second.result()

        ways = {"sequential": twice, "streams": together}
        run = ways.get(str(choice.guidance_mode), once)
        outputs = run()  # the first run allocates
        self._check(name, outputs, batch)
        self._run, self._open = run, (name, choice)

    def _component(self, name: str, batch: int) -> Component:
        assert self._components is not None
        if name == "unet":
            return self._components.unet(*self.size, batch=batch)
        if name == "vae_decoder":
            return self._components.vae_decoder(*self.size, pixels=True)
        return self._components.text_encoder(name, (self.folder.kind.skipped_layers,))

    def _check(self, name: str, outputs: Mapping[str, Array], batch: int) -> None:
        """Raise SdvinoError unless ``outputs`` are numbers, and near the first ones."""
        if problem_of("", outputs) is not None:
            raise SdvinoError("it gives values that are not numbers")
        if batch > 1:
            return  # other noise in the second half
        result = {
            key: np.array(value) for key, value in outputs.items() if value.dtype.kind in "fu"
        }
        reference = self._references.setdefault(name, result)
        error = max((relative_error(result[key], reference[key]) for key in reference), default=0.0)
        if error > CANARY_TOLERANCE:
            raise SdvinoError(f"its results are off by {error:.0%}")


def _inputs(component: Component) -> dict[str, Array]:
    """Return inputs of the right shapes with numbers as they occur: unit noise, a timestep."""
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    for port in component.compiled.inputs:
        name = min(port.get_names(), key=lambda word: (word.isdigit(), len(word), word))
        shape = tuple(port.get_shape())
        dtype = port.get_element_type().to_dtype()
        if dtype.kind != "f" or name == "timestep":
            inputs[name] = np.full(shape, _TIMESTEP if dtype.kind == "f" else 1, dtype)
        else:
            inputs[name] = rng.standard_normal(shape).astype(dtype)
    return inputs
