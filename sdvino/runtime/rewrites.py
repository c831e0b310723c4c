"""Rewrites of a graph that depend on the hardware it is compiled for."""

from __future__ import annotations

from collections.abc import Mapping

import openvino as ov

from sdvino.graph.linears import linears_to_convolutions
from sdvino.runtime.properties import DeviceFacts, convolves_linears
from sdvino.settings import DeviceSettings


def rewrite_for(
    model: ov.Model, settings: DeviceSettings, facts: Mapping[str, DeviceFacts]
) -> None:
    """Rewrite ``model``, in place, into what runs fastest where ``facts`` are of; exact.

    A second time it changes nothing.
    """
    if convolves_linears(settings, facts):
        linears_to_convolutions(model)
