"""sdvino: Stable Diffusion on the laptop you already have.

The public names are loaded when first used, so ``import sdvino`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdvino.errors import Cancelled, DeviceError, ModelFolderError, RequestError, SdvinoError
    from sdvino.outputs import PipelineOutput
    from sdvino.pipeline import StableDiffusionPipeline
    from sdvino.settings import DeviceSettings, RunSettings, SamplerSettings, SpeedSettings
    from sdvino.tuning.bench import BenchReport, measure_model

__version__ = "0.1.0"

_HOMES = {
    "BenchReport": "sdvino.tuning.bench",
    "measure_model": "sdvino.tuning.bench",
    "Cancelled": "sdvino.errors",
    "DeviceError": "sdvino.errors",
    "ModelFolderError": "sdvino.errors",
    "RequestError": "sdvino.errors",
    "SdvinoError": "sdvino.errors",
    "PipelineOutput": "sdvino.outputs",
    "StableDiffusionPipeline": "sdvino.pipeline",
    "DeviceSettings": "sdvino.settings",
    "RunSettings": "sdvino.settings",
    "SamplerSettings": "sdvino.settings",
    "SpeedSettings": "sdvino.settings",
}

__all__ = [
    "BenchReport",
    "Cancelled",
    "DeviceError",
    "DeviceSettings",
    "ModelFolderError",
    "PipelineOutput",
    "RequestError",
    "RunSettings",
    "SamplerSettings",
    "SdvinoError",
    "SpeedSettings",
    "StableDiffusionPipeline",
    "__version__",
    "measure_model",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdvino' has no attribute {name!r}")
