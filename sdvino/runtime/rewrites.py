"""Rewrites of a graph that depend on the hardware it is compiled for."""

from __future__ import annotations

from collections.abc import Mapping

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

    ``component`` is what the model is of, ``precision`` what its floats are computed in. A second
    time it changes nothing.
    """
    if convolves_linears(settings, facts):
        linears_to_convolutions(model)
    if cpus_alone(facts):
        zero_points_to_biases(model)
    if norms_by_channel(component, precision, facts):
        group_norms_to_channels(model)
