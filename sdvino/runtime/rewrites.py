"""Rewrites of a graph that depend on the hardware it is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import openvino as ov

from sdvino.graph.linears import linears_to_convolutions
from sdvino.graph.norms import group_norms_to_channels
from sdvino.graph.zero_points import zero_points_to_biases
from sdvino.runtime.properties import (
    DeviceFacts,
    convolves_linears,
    cpus_alone,
    norms_by_channel,
)
from sdvino.settings import DeviceSettings


def rewrite_for(
    model: ov.Model,
    component: str,
    settings: DeviceSettings,
    precision: str | None,
    facts: Mapping[str, DeviceFacts],
) -> None:
    """Rewrite ``model``, in place, into what runs fastest where ``facts`` are of; exact.

    The arguments are those of `rewrites_for`. A second time it changes nothing.
    """
    for rewrite in rewrites_for(component, settings, precision, facts).values():
        rewrite(model)


def rewrites_for(
    component: str,
    settings: DeviceSettings,
    precision: str | None,
    facts: Mapping[str, DeviceFacts],
) -> dict[str, Callable[[ov.Model], object]]:
    """Return the rewrites of the graph of ``component``, in order, by what they do.

    ``precision`` is what its floats are computed in, ``facts`` are of the hardware.
    """
    found: dict[str, Callable[[ov.Model], object]] = {}
    if convolves_linears(settings, facts):
        found["8-bit linears as convolutions"] = linears_to_convolutions
    if cpus_alone(facts):
        found["zero points in biases"] = zero_points_to_biases
    if norms_by_channel(component, precision, facts):
        found["group norms by channel"] = group_norms_to_channels
    return found
