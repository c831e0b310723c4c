"""Wrong numbers, found where they arise: not-a-number, a picture of one colour, a GPU that errs.

Float layers in f16 or bf16 can overflow, and GPU drivers have given garbage in silence. Every
component's results pass through a `Guard`. What it finds wrong it computes again in a safer
precision or on the CPU, once; it says so in one sentence, and remembers it for this machine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import SdvinoError
from sdvino.runtime.component import Component
from sdvino.runtime.defaults import safer
from sdvino.runtime.profile import Fallback, ProfileMemory
from sdvino.settings import DeviceSettings
from sdvino.weights.numbers import relative_error

Array = NDArray[Any]

_log = logging.getLogger("sdvino")
#: How far a device may be from the CPU in one evaluation of the UNet, relative to the length of the
#: CPU's result. f16 is within a hundredth and quantized layers within a few; the garbage that
#: drivers have given is off by more than half.
CANARY_TOLERANCE = 0.1
#: A first run on the CPU also allocates: only within this factor is it timed again.
_CLOSE = 1.5
#: Pixels that are looked at before all of them.
_GLANCE = 256
_NOT_NUMBERS = "it gave values that are not numbers"
_ONE_COLOUR = "it gave a picture of one colour"
#: Component -> how sentences call it.
_TITLES = {
    "unet": "UNet",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
    "tiny_vae": "tiny VAE decoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}


def problem_of(name: str, outputs: Mapping[str, Array]) -> str | None:
    """Return what is wrong with the ``outputs`` of the component ``name``, or None.

    Floats must be numbers; a graph of `sdvino.graph.vae` says so itself in ``finite``. A decoded
    picture whose three channels each span at most one of 256 levels is flat.
    """
    if not np.all(outputs.get("finite", True)):
        return _NOT_NUMBERS
    for array in {id(array): array for array in outputs.values()}.values():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return _NOT_NUMBERS
    pixels = outputs.get("pixels")
    if name == "vae_decoder" and pixels is not None:
        colours = pixels.reshape(-1, pixels.shape[-1])
        # A few pixels are enough to see that a picture is not flat.
        if _flat(colours[:: max(1, len(colours) // _GLANCE)]) and _flat(colours):
            return _ONE_COLOUR
    return None


def _flat(colours: Array) -> bool:
    """Return whether each channel of ``colours``, [pixels, 3], spans at most one level."""
    level = 1.0 if colours.dtype == np.uint8 else 1.0 / 255.0
    return bool(np.all(np.ptp(colours.astype(np.float32, copy=False), axis=0) <= level))


class Guard:
    """Checks every result of the components it is given to; see the head of this file.

    ``memory`` keeps what was found between runs; None keeps it for this process alone.
    """

    def __init__(
        self,
        memory: ProfileMemory | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.memory = memory
        self._clock = clock
        self._lock = threading.RLock()
        self._busy = threading.local()
        #: Components whose flat pictures were not the precision's fault.
        self._flat_is_right: set[str] = set()
        #: Components and devices compared with the CPU.
        self._judged: set[tuple[str, str]] = set()
        self._said: set[str] = set()
        self._fallbacks: dict[str, Fallback] = {}
        if memory is not None:
            self._fallbacks.update(memory.profile.fallbacks)

    def settings(self, name: str, settings: DeviceSettings) -> DeviceSettings:
        """Return ``settings`` of the component ``name``, or what went well in their place before.

        A precision that the user chose is tried again.
        """
        fallback = self._fallbacks.get(name)
        if fallback is None or _plain(settings.device) != _plain(fallback.from_device):
            return settings
        if settings.precision is not None and fallback.device == fallback.from_device:
            return settings
        self._say(
            name,
            f"The {_title(name)} runs on {fallback.device} in {fallback.precision}, because on"
            f" {_place(fallback)} {fallback.why} earlier; --no-profile tries again.",
        )
        return _moved(settings, fallback.device, fallback.precision)

    def check(
        self,
        component: Component,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        settings: DeviceSettings,
    ) -> Mapping[str, Array]:
        """Return ``outputs``, or those of a second run in a safer place where they are wrong.

        ``settings`` are those of the first run: another thread may have left them since.
        Raises SdvinoError where the safest place gives values that are not numbers either.
        """
        if getattr(self._busy, "now", False):
            return outputs
        problem = self._problem(component, outputs)
        stale = component.settings is not settings or self._left(component)
        if problem is None and not stale and not self._unknown(component):
            return outputs
        with self._lock:
            self._busy.now = True
            try:
                if self._left(component):  # on account of another graph of the same part
                    component.change(self.settings(component.name, component.settings))
                if component.settings is not settings:
                    outputs = component.infer(inputs)
                    problem = self._problem(component, outputs)
                if problem is not None and _are_numbers(inputs):
                    outputs = self._again(component, inputs, outputs, problem)
                if self._unknown(component):
                    outputs = self._compare(component, inputs, outputs)
            finally:
                self._busy.now = False
        return outputs

    def _left(self, component: Component) -> bool:
        """Return whether ``component`` is in a place that its part has left meanwhile."""
        settings = component.settings
        return self.settings(component.name, settings) is not settings

    def _problem(self, component: Component, outputs: Mapping[str, Array]) -> str | None:
        problem = problem_of(component.name, outputs)
        flat_is_right = component.name in self._flat_is_right
        return None if problem == _ONE_COLOUR and flat_is_right else problem

    def _again(
        self,
        component: Component,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        problem: str,
    ) -> Mapping[str, Array]:
        """Run in a safer place; stay there if that helped."""
        name, before = component.name, component.settings
        precision = component.precision
        place = safer(before.device, precision)
        if place is not None:
            component.change(_moved(before, *place))
            outputs = component.infer(inputs)
            left = problem_of(name, outputs)
            if left is None:
                self._fall_back(
                    component, _fallback(before.device, precision, place, problem), problem
                )
                return outputs
            if left == _ONE_COLOUR:
                # The picture is that way. The safer place stays for this run: one load is enough.
                self._flat_is_right.add(name)
                return outputs
        elif problem == _ONE_COLOUR:
            self._flat_is_right.add(name)
        if problem == _NOT_NUMBERS and "finite" not in outputs:  # those have a message of their own
            raise SdvinoError(
                f"The {_title(name)} gave values that are not numbers, in full precision too;"
                " get or convert the model again, or try another scheduler."
            )
        return outputs

    def _unknown(self, component: Component) -> bool:
        """Return whether this is a UNet on hardware that was never compared with the CPU."""
        if component.name != "unet":
            return False
        foreign = [name for name in component.hardware if name != "CPU"]
        device = component.settings.device
        if not foreign or (component.name, device) in self._judged:
            return False
        return self.memory is None or not self.memory.trusts(component.name, device)

    def _compare(
        self, component: Component, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Compare one evaluation with the CPU's, and time both; stay on the better one."""
        name, before = component.name, component.settings
        result = _copies(outputs)
        seconds = self._seconds(component, inputs)  # a second run: the first one allocated
        precision = component.precision
        twin = component.twin(_moved(before, "CPU", None))
        try:
            twin.load()
            started = self._clock()
            reference = _copies(twin.infer(inputs))
            cpu_seconds = self._clock() - started
            if seconds < cpu_seconds < seconds * _CLOSE:
                cpu_seconds = min(cpu_seconds, self._seconds(twin, inputs))
            place = ("CPU", "f32" if twin.precision is None else twin.precision)
        finally:
            twin.unload()
        self._judged.add((name, before.device))
        error = max(relative_error(result[key], reference[key]) for key in reference)
        problem = _verdict(error, seconds, cpu_seconds)
        if problem is None:
            if self.memory is not None:
                ratio = cpu_seconds / max(seconds, 1e-9)
                self.memory.trust(name, before.device, f"error {error:.1e}, {ratio:.1f} x the CPU")
            return result
        component.change(_moved(before, "CPU", None))
        self._fall_back(component, _fallback(before.device, precision, place, problem), problem)
        return reference

    def _seconds(self, component: Component, inputs: Mapping[str, Array]) -> float:
        started = self._clock()
        component.infer(inputs)
        return self._clock() - started

    def _fall_back(self, component: Component, fallback: Fallback, problem: str) -> None:
        name = component.name
        self._fallbacks[name] = fallback
        if self.memory is not None:
            self.memory.remember(name, fallback)
        self._say(
            name,
            f"The {_title(name)} ran on {_place(fallback)} and {problem.removeprefix('it ')};"
            f" it runs on {fallback.device} in {fallback.precision} from now on.",
        )

    def _say(self, name: str, sentence: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _log.warning(sentence)


def _verdict(error: float, seconds: float, cpu_seconds: float) -> str | None:
    """Return what speaks against the device, or None."""
    if not error <= CANARY_TOLERANCE:
        amount = "are not numbers" if not np.isfinite(error) else f"are off by {error:.0%}"
        return f"its results {amount}"
    if seconds > cpu_seconds:
        return f"it took {seconds:.2f} s an evaluation where the CPU takes {cpu_seconds:.2f} s"
    return None


def _fallback(device: str, precision: str | None, place: tuple[str, str], problem: str) -> Fallback:
    return Fallback(
        from_device=device,
        from_precision=precision,
        device=place[0],
        precision=place[1],
        why=problem,
    )


def _place(fallback: Fallback) -> str:
    precision = fallback.from_precision
    return fallback.from_device + ("" if precision is None else f" in {precision}")


def _moved(settings: DeviceSettings, device: str, precision: Any) -> DeviceSettings:
    """Return ``settings`` for another place; threads and streams are those of the old device."""
    if _plain(device) == _plain(settings.device):
        return replace(settings, precision=precision)
    return replace(settings, device=device, precision=precision, num_streams=None)


def _copies(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.array(array) for name, array in outputs.items()}


def _are_numbers(inputs: Mapping[str, Array]) -> bool:
    arrays = [np.asarray(array) for array in inputs.values()]
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")


def _plain(device: str) -> str:
    return device.strip().upper()


def _title(name: str) -> str:
    return _TITLES.get(name, name)
