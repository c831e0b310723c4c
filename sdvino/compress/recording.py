"""What the components of a running pipeline are given and give back, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sdvino.runtime.component import Component
from sdvino.runtime.components import Components

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """One inference: copies of what went in and of the floats that came out, by tensor name."""

    inputs: Arrays
    outputs: Arrays


@dataclass(slots=True)
class Tap:
    """Stands before a component and writes its calls down while ``open``."""

    component: Component
    calls: list[Call] = field(default_factory=list)
    open: bool = True

    def infer(self, inputs: Arrays) -> Arrays:
        """Run the component; see `sdvino.runtime.component.Component.infer`."""
        return self.infer_each([inputs])[0]

    def infer_each(self, inputs: Sequence[Arrays], *, together: bool = False) -> list[Arrays]:
        """Run the component once for each of ``inputs``, and write that down."""
        results = self.component.infer_each(inputs, together=together)
        if self.open:
            for given, outputs in zip(inputs, results, strict=True):
                kept = {name: np.array(value) for name, value in given.items()}
                self.calls.append(Call(kept, floats(outputs)))
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.component, name)


class Recorder:
    """Writes down the calls of a pipeline's components, by name: ``recorder.calls("unet")``."""

    def __init__(self, components: Components) -> None:
        """Stand before ``components`` from now on."""
        self.components = components
        self.taps: dict[str, Tap] = {}
        self._recording = True
        components.observe = self._observe

    def calls(self, name: str) -> list[Call]:
        """Return the calls of one component so far, oldest first."""
        return self.taps[name].calls if name in self.taps else []

    def record(self, on: bool) -> None:
        """Begin, or stop, writing calls down."""
        self._recording = on
        for tap in self.taps.values():
            tap.open = on

    def _observe(self, name: str, component: Component) -> Component:
        tap = self.taps.get(name)
        if tap is None:
            tap = self.taps[name] = Tap(component, open=self._recording)
        tap.component = component
        return cast(Component, tap)


def floats(outputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return copies of the numbers and pictures among the outputs, each under one of its names."""
    kept: dict[str, NDArray[np.float32]] = {}
    seen: set[int] = set()
    for name in sorted(outputs, key=lambda name: (name.isdigit(), name)):
        value = np.asarray(outputs[name])
        address = value.__array_interface__["data"][0]
        if (value.dtype.kind == "f" or value.dtype == np.uint8) and address not in seen:
            seen.add(address)
            kept[name] = as_floats(value)
    return kept


def as_floats(value: NDArray[Any]) -> NDArray[np.float32]:
    """Return a float32 copy; the levels of a picture become 0 to 1."""
    scale = np.float32(255.0 if np.asarray(value).dtype == np.uint8 else 1.0)
    scaled: NDArray[np.float32] = np.array(value, np.float32) / scale
    return scaled
