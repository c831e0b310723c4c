"""Arrays that stay in a device's memory while a picture is made: text states, on a GPU.

A UNet reads the same text states at every step. Where the device's plugin has contexts (GPUs do,
the CPU needs none) they are copied there once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.runtime.core import shared_core, short_reason

Array = NDArray[Any]
_log = logging.getLogger("sdvino")


class DeviceArray:
    """An array and its copy on ``device``; elsewhere it is read as the array that it is."""

    def __init__(self, array: Array, device: str, tensor: Any) -> None:
        self.array = array
        self.device = device
        #: An openvino.RemoteTensor.
        self.tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype) if copy else np.asarray(self.array, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape


def keep_on_device(
    hardware: tuple[str, ...], inputs: Mapping[str, Array], core: ov.Core | None = None
) -> Mapping[str, Array]:
    """Return ``inputs`` with float32 arrays copied to the device that a component runs on.

    ``hardware`` is that of `sdvino.runtime.component.Component`, which takes the result. They come
    back as they are for the CPU, for several devices, and where the plugin has no contexts.
    """
    if len(hardware) != 1 or not hardware[0].startswith("GPU"):
        return inputs
    core = shared_core() if core is None else core
    try:
        context = core.get_default_context(hardware[0])
        kept: dict[str, Any] = {}
        for name, array in inputs.items():
            if array.dtype != np.float32:
                kept[name] = array
                continue
            tensor = context.create_tensor(ov.Type.f32, ov.Shape(array.shape), {})
            tensor.copy_from(ov.Tensor(np.ascontiguousarray(array), shared_memory=False))
            kept[name] = DeviceArray(array, hardware[0], tensor)
    except RuntimeError as error:
        _log.debug("No tensors on %s (%s).", hardware[0], short_reason(error))
        return inputs
    return cast("Mapping[str, Array]", kept)
