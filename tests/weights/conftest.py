"""Small models for LoRAs to be merged into."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def sd() -> dict[str, Any]:
    """The modules of a small Stable Diffusion 1.x."""
    from tests.weights.lora_modules import small_sd

    return small_sd()


@pytest.fixture(scope="session")
def sdxl() -> dict[str, Any]:
    """The modules of a small Stable Diffusion XL."""
    from tests.weights.lora_modules import small_sdxl

    return small_sdxl()
