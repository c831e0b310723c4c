"""Euler: one step along the probability-flow ODE, of any noise process."""

from __future__ import annotations

from collections.abc import Iterator

from sdvino.diffusion.denoiser import Denoise
from sdvino.diffusion.grid import Float32, Grid
from sdvino.diffusion.noise import NoiseSource
from sdvino.diffusion.samplers.step import SamplerStep, advance


def sample_euler(
    denoise: Denoise, x: Float32, grid: Grid, noise: NoiseSource, *, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1 without its second half."""
    for i, level, to in grid.walk():
        x0 = denoise(x, level)
        x = advance(x, x0, level, to)
        yield SamplerStep(i, x, x0, level)
