"""Exact rewrites: the autoencoder takes and gives what people have, pictures and scaled latents.

An exported AutoencoderKL speaks in unscaled latents and in NCHW floats from -1 to 1. diffusers
scales, clamps, rounds and transposes in Python around it; here the same arithmetic becomes part of
the graph, in memory only: a saved graph with baked scaling would be wrong in every other program.
"""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.protocol import find_input, find_output, has_output

#: Bounds that diffusers puts on the log variance of the encoder's distribution.
_LOGVAR = (-30.0, 20.0)


def decoder_to_pixels(
    model: ov.Model, scaling_factor: float, shift_factor: float | None = None
) -> None:
    """Turn a VAE decoder, in place, into latents -> 8-bit picture; exact.

    The input ``latent_sample`` float32 [N, C, h, w] then holds latents scaled as diffusers' are.
    Outputs: ``pixels`` uint8 [N, H, W, 3], rounded and clamped as diffusers does, and ``finite``
    bool [N], false where the decoder gave NaN or infinity (which 8 bits would hide).
    Raises ModelFolderError when the graph or the factors are not an autoencoder's.
    """
    picture = _decode_to_unit(model, scaling_factor, shift_factor)
    levels = ops.round(ops.multiply(picture, np.float32(255.0)), "half_to_even")
    _finish_decoder(model, ops.convert(levels, "u8"))


def decoder_to_float(
    model: ov.Model, scaling_factor: float, shift_factor: float | None = None
) -> None:
    """Turn a VAE decoder, in place, into latents -> float picture, for blending tiles; exact.

    As `decoder_to_pixels`, but ``pixels`` is float32 [N, H, W, 3] from 0 to 1.
    """
    _finish_decoder(model, _decode_to_unit(model, scaling_factor, shift_factor))


def encoder_from_pixels(
    model: ov.Model, scaling_factor: float, shift_factor: float | None = None
) -> None:
    """Turn a VAE encoder, in place, into 8-bit picture -> latents; exact.

    The input ``sample`` becomes uint8 [N, H, W, 3]. Outputs: ``latents`` float32 [N, C, h, w],
    scaled as diffusers', the mean of the distribution; and, where the export gives the
    distribution's parameters (optimum-intel's does), ``latents_std`` of the same shape, so that a
    sample is ``latents + latents_std * noise``. An export that gives ``latent_sample`` has drawn
    that sample itself, and ``latents`` is then it.
    Raises ModelFolderError when the graph or the factors are not an autoencoder's.
    """
    scaling, shift = _check_factors(scaling_factor, shift_factor)
    _pixels_in(model)
    if not has_output(model, "latent_parameters"):
        sample = find_output(model, "latent_sample")
        _replace_outputs(
            model, {"latents": _scale(sample.get_node().input_value(0), scaling, shift)}
        )
        return
    parameters = find_output(model, "latent_parameters").get_node().input_value(0)
    mean, logvar = ops.split(parameters, np.int64(1), 2).outputs()
    half = ops.multiply(ops.clamp(logvar, *_LOGVAR), np.float32(0.5))
    std = ops.multiply(ops.exp(half), scaling)
    _replace_outputs(model, {"latents": _scale(mean, scaling, shift), "latents_std": std.output(0)})


def _check_factors(
    scaling_factor: float, shift_factor: float | None
) -> tuple[np.float32, np.float32 | None]:
    if not (math.isfinite(scaling_factor) and 1e-6 < abs(scaling_factor) < 1e6):
        raise ModelFolderError(
            f"The autoencoder's scaling_factor is {scaling_factor}, which cannot be;"
            " correct it in the config.json beside the model (0.18215 for Stable Diffusion 1.x)."
        )
    if shift_factor is not None and not (math.isfinite(shift_factor) and abs(shift_factor) < 1e6):
        raise ModelFolderError(
            f"The autoencoder's shift_factor is {shift_factor}, which cannot be;"
            " correct it in the config.json beside the model."
        )
    return np.float32(scaling_factor), None if shift_factor is None else np.float32(shift_factor)


def _decode_to_unit(
    model: ov.Model, scaling_factor: float, shift_factor: float | None
) -> ov.Output:
    """Put the scaling before the decoder; return its picture, NCHW, clamped to 0 .. 1."""
    scaling, shift = _check_factors(scaling_factor, shift_factor)
    latents = find_input(model, "latent_sample")
    consumers = latents.get_target_inputs()
    unscaled = ops.divide(latents, scaling)
    if shift is not None:
        unscaled = ops.add(unscaled, shift)
    for consumer in consumers:
        consumer.replace_source_output(unscaled.output(0))
    picture = find_output(model, "sample").get_node().input_value(0)
    halved = ops.add(ops.multiply(picture, np.float32(0.5)), np.float32(0.5))
    return ops.clamp(halved, 0.0, 1.0).output(0)


def _finish_decoder(model: ov.Model, picture: ov.Output | ov.Node) -> None:
    """Give ``picture`` (NCHW) out as ``pixels`` (NHWC), with ``finite`` beside it."""
    raw = find_output(model, "sample").get_node().input_value(0)
    finite = ops.reduce_logical_and(ops.is_finite(raw), np.array([1, 2, 3], np.int64))
    pixels = ops.transpose(picture, np.array([0, 2, 3, 1], np.int64))
    _replace_outputs(model, {"pixels": pixels.output(0), "finite": finite.output(0)})


def _scale(latents: ov.Output, scaling: np.float32, shift: np.float32 | None) -> ov.Output:
    if shift is not None:
        latents = ops.subtract(latents, shift).output(0)
    return ops.multiply(latents, scaling).output(0)


def _pixels_in(model: ov.Model) -> None:
    """Replace the input ``sample``, float NCHW in -1 .. 1, by 8-bit levels, NHWC."""
    old = find_input(model, "sample")
    shape = old.get_partial_shape()
    if shape.rank.is_dynamic or shape.rank.get_length() != 4:
        raise ModelFolderError(
            "The VAE encoder does not take a picture [N, 3, H, W];"
            " export it again with optimum-intel or `sdvino convert`."
        )
    pixels = ops.parameter(
        ov.PartialShape([shape[0], shape[2], shape[3], 3]), ov.Type.u8, name="sample"
    )
    old.set_names(set())
    pixels.output(0).set_names({"sample"})
    unit = ops.divide(ops.convert(pixels, "f32"), np.float32(255.0))
    signed = ops.subtract(ops.multiply(unit, np.float32(2.0)), np.float32(1.0))
    picture = ops.transpose(signed, np.array([0, 3, 1, 2], np.int64))
    for consumer in old.get_target_inputs():
        consumer.replace_source_output(picture.output(0))
    model.add_parameters([pixels])
    model.remove_parameter(old.get_node())


def _replace_outputs(model: ov.Model, outputs: dict[str, ov.Output]) -> None:
    for result in model.get_results():
        model.remove_result(result)
    for name, port in outputs.items():
        port.set_names({name})
        result = ops.result(port)
        result.set_friendly_name(f"{name}/result")
        model.add_results([result])
    model.validate_nodes_and_infer_types()
