"""The edits that make a folder's graphs those that run: what each does, by plain arguments.

All are changes in place for an `sdvino.graph.edit.Edit`. Shapes are of inputs, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import openvino as ov

from sdvino.graph.cut import Stages, cut_at_skip, cut_by_weight, keep_stage, stage_count
from sdvino.graph.geglu import split_projections
from sdvino.graph.linears import linears_to_convolutions
from sdvino.graph.norms import group_norms_to_channels
from sdvino.graph.scales import fold_scales
from sdvino.graph.text_keys import give_text_keys, take_text_keys
from sdvino.graph.text_states import give_states
from sdvino.graph.timestep import float_timestep
from sdvino.graph.tokens import thin_keys
from sdvino.graph.vae import decoder_to_float, decoder_to_pixels, encoder_from_pixels
from sdvino.graph.walk import freeze_shapes, reshape_static
from sdvino.graph.zero_points import zero_points_to_biases

Shapes = Mapping[str, Sequence[int]]


def prepare_text_encoder(
    model: ov.Model, *, skipped: Sequence[int], final_norm: bool, pooled: bool, length: int
) -> None:
    """Make a text encoder give its states without so many of its last layers each; exact."""
    give_states(model, skipped, final_norm=final_norm, pooled=pooled)
    reshape_static(model, {"input_ids": [1, length]})


def prepare_unet(
    model: ov.Model,
    *,
    shapes: Shapes,
    text_apart: bool = False,
    token_downsampling: int = 1,
    branch: int | None = None,
    pieces: int = 1,
    stage: int | None = None,
) -> None:
    """Make an exported UNet one with a float timestep; exact but for ``token_downsampling``.

    With ``text_apart`` its inputs are what `prepare_text_keys` gives. It is cut at the skip
    connection ``branch``, or else into ``pieces`` of equal weights; ``stage`` is kept of it, None:
    the whole.
    """
    _prepare(model, shapes)
    if text_apart:
        take_text_keys(model)
    if token_downsampling > 1:
        height, width = shapes["sample"][-2:]
        thin_keys(model, token_downsampling, (height, width))
    if stage is not None:
        keep_stage(model, _cut(model, branch, pieces), stage)


def prepare_text_keys(model: ov.Model, *, shapes: Shapes) -> None:
    """Make of an exported UNet what it makes of the text alone; exact."""
    _prepare(model, shapes)
    give_text_keys(model)


def count_stages(model: ov.Model, *, branch: int | None = None, pieces: int = 1) -> int:
    """Return into how many stages `prepare_unet` cuts ``model``, which it made without one."""
    return stage_count(_cut(model, branch, pieces))


def prepare_decoder(
    model: ov.Model, *, pixels: bool, scaling: float, shift: float | None, shape: Sequence[int]
) -> None:
    """Make a VAE decoder take latents as diffusers scales them, and give pictures; exact."""
    edit = decoder_to_pixels if pixels else decoder_to_float
    edit(model, scaling, shift)
    reshape_static(model, {"latent_sample": shape})


def prepare_encoder(
    model: ov.Model, *, scaling: float, shift: float | None, shape: Sequence[int]
) -> None:
    """Make a VAE encoder take pictures, and give latents as diffusers scales them; exact."""
    encoder_from_pixels(model, scaling, shift)
    reshape_static(model, {"sample": shape})


def prepare_for_hardware(
    model: ov.Model, *, convolutions: bool, biases: bool, channels: bool
) -> None:
    """Make rewrites that pay on some hardware alone; exact, and a second time nothing changes.

    8-bit linear layers become ``convolutions``, zero points ``biases``, and group norms means of
    ``channels``.
    """
    if convolutions:
        linears_to_convolutions(model)
    if biases:
        zero_points_to_biases(model)
    if channels:
        group_norms_to_channels(model)


def _prepare(model: ov.Model, shapes: Shapes) -> None:
    """Make the exact rewrites that both parts of a UNet share, so that their tensors agree."""
    float_timestep(model)
    reshape_static(model, shapes)
    freeze_shapes(model)
    split_projections(model)
    fold_scales(model)


def _cut(model: ov.Model, branch: int | None, pieces: int) -> Stages:
    return cut_by_weight(model, pieces) if branch is None else cut_at_skip(model, branch)
