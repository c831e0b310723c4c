"""What choosing for each layer is worth: global and local quantization at the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.component_recipe import ComponentRecipe
from sdvino.compress.local_plan import LocalPlan
from sdvino.compress.local_quantization import Effects, measure, quantize_local
from sdvino.compress.quantization import quantize_global
from sdvino.compress.sensitivity import Sample, run_model
from sdvino.compress.targets import Target, get_target
from sdvino.compress.weight_graph import weight_bytes
from sdvino.errors import SdvinoError
from sdvino.graph.saving import read_ir
from sdvino.weights.numbers import mean_relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualBytes:
    """One component by both: errors of its output on inputs that neither was calibrated on."""

    component: str
    #: Whether activations are in 8 bits too, in both.
    activations: bool
    #: Bytes of the constants as they are saved; local takes no more than global.
    global_bytes: int
    local_bytes: int
    half_bytes: int
    #: Relative error of the output, root mean square over the inputs.
    global_error: float
    local_error: float
    plan: LocalPlan

    @property
    def margin(self) -> float:
        """Return the share of the global error that local quantization avoids."""
        return 1.0 - self.local_error / self.global_error if self.global_error > 0.0 else 0.0

    def __str__(self) -> str:
        kind = "weights and activations" if self.activations else "weights alone"
        return (
            f"{self.component}, {kind}, at {self.global_bytes / 1e6:.2f} MB: error of the output"
            f" {self.global_error:.2%} by one scheme, {self.local_error:.2%} by layer"
            f" ({self.local_bytes / 1e6:.2f} MB), {self.margin:.0%} less"
        )


def compare_at_equal_bytes(
    component: str,
    float_xml: Path,
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    *,
    activations: bool = False,
    groups: int | None = None,
    effects: Effects | None = None,
    target: Target | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> EqualBytes:
    """Quantize a component by one scheme, then by layer into the same bytes, and compare.

    ``samples`` calibrate both and measure the layers' effects (``groups``, and ``effects`` where
    they are known: see `sdvino.compress.local_quantization.measure`); errors are taken on
    ``unseen``. Both are inputs by tensor name, all of one shape. ``target`` None is this machine's
    processor. Raises SdvinoError where they do not come to the same bytes.
    """
    target = get_target("auto") if target is None else target
    half = weight_bytes(read_ir(float_xml))
    expected = run_model(read_ir(float_xml), unseen)
    if effects is None:
        effects = measure(
            read_ir(float_xml), samples, groups=groups, progress=lambda share: progress(share / 2)
        )
    one = ComponentRecipe(mode="global", activations=activations)
    model = quantize_global(component, read_ir(float_xml), samples, recipe=one, target=target)
    global_bytes, global_error = weight_bytes(model), _error(model, unseen, expected)
    # What activations and groups add to a graph is not in the plan, and differs a little from plan
    # to plan: some room is left for it.
    room = global_bytes // 500
    budget = global_bytes - room
    for share in (0.7, 0.8, 0.9):
        progress(share)
        recipe = ComponentRecipe(mode="local", budget=float(budget), activations=activations)
        model, plan = quantize_local(
            component,
            read_ir(float_xml),
            samples,
            recipe=recipe,
            target=target,
            effects=effects,
        )
        local_bytes, local_error = weight_bytes(model), _error(model, unseen, expected)
        if local_bytes <= global_bytes:
            break
        budget -= local_bytes - global_bytes + room
    progress(1.0)
    if local_bytes > global_bytes:
        raise SdvinoError(
            f"The {component} takes {local_bytes} bytes by layer and {global_bytes} by one scheme:"
            " they cannot be compared."
        )
    return EqualBytes(
        component=component,
        activations=activations,
        global_bytes=global_bytes,
        local_bytes=local_bytes,
        half_bytes=half,
        global_error=global_error,
        local_error=local_error,
        plan=plan,
    )


def _error(
    model: ov.Model, samples: Sequence[Sample], expected: Sequence[NDArray[np.float32]]
) -> float:
    return mean_relative_error(run_model(model, samples), expected)
