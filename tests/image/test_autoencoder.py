from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.graph.vae import decoder_to_float, decoder_to_pixels, encoder_from_pixels
from sdvino.graph.walk import reshape_static
from sdvino.image.autoencoder import VaeDecoder, VaeEncoder
from sdvino.image.tiling import to_levels
from sdvino.runtime.component import Component
from sdvino.settings import DeviceSettings
from tests.graph.exported import SCALING, Compiled, read, some_latents, torch_pipeline, xml


def decoder(edit: Any = decoder_to_pixels) -> VaeDecoder:
    model = read("vae_decoder")
    edit(model, SCALING)
    return VaeDecoder(Compiled(model))


def test_pictures_of_another_size_are_refused() -> None:
    latents = some_latents(1, 4, 6, 9)
    component = decoder()._component
    assert VaeDecoder(component, 8).decode(latents).shape == (1, 48, 72, 3)
    with pytest.raises(ModelFolderError, match="36 x 24 was due"):
        VaeDecoder(component, 4).decode(latents)


def test_pictures_are_those_of_diffusers() -> None:
    latents = some_latents(3, 4, 6, 9)
    with torch.no_grad():
        picture = torch_pipeline().vae.decode(torch.from_numpy(latents) / SCALING).sample
    expected = VaeImageProcessor().postprocess(picture, output_type="np")
    levels = decoder().decode(latents)
    assert levels.dtype == np.uint8
    assert levels.shape == (3, 48, 72, 3)
    # Half a level is rounding, the rest is float noise at the edge between two levels.
    assert np.abs(levels - expected * 255).max() < 0.51
    as_float = decoder(decoder_to_float)
    np.testing.assert_allclose(as_float.decode_float(latents), expected, atol=1e-5)
    np.testing.assert_array_equal(
        as_float.decode(latents), to_levels(as_float.decode_float(latents))
    )


@pytest.mark.slow
def test_the_runtime_runs_it() -> None:
    def prepare(model: ov.Model) -> None:
        decoder_to_pixels(model, SCALING)
        reshape_static(model, {"latent_sample": [1, 4, 4, 6]})

    component = Component(
        "vae_decoder", xml("vae_decoder"), DeviceSettings(precision="f32"), prepare=prepare
    )
    latents = some_latents(2, 4, 4, 6)
    levels = VaeDecoder(component).decode(latents).astype(np.int16)
    assert np.abs(levels - decoder().decode(latents)).max() <= 1
    latents[0] = np.nan
    with pytest.raises(SdvinoError, match="--precision f32"):
        VaeDecoder(component).decode(latents)


def test_the_first_picture_is_not_overwritten_by_the_second() -> None:
    vae = decoder()
    latents = some_latents(2, 4, 4, 4)
    first = vae.decode(latents[:1])
    kept = first.copy()
    vae.decode(latents[1:])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_a_number_names_the_precision(broken: float) -> None:
    latents = some_latents(2, 4, 4, 4)
    latents[1, 2, 3, 3] = broken
    for edit in (decoder_to_pixels, decoder_to_float):
        with pytest.raises(SdvinoError, match="--precision f32") as caught:
            decoder(edit).decode(latents)
        assert caught.value.exit_code == 1


def test_latents_of_other_shapes_are_refused() -> None:
    for shape in ((4, 4, 4), (0, 4, 4, 4)):
        with pytest.raises(RequestError, match="Latents"):
            decoder().decode(np.zeros(shape, np.float32))


def encoder() -> VaeEncoder:
    model = read("vae_encoder")
    encoder_from_pixels(model, SCALING)
    return VaeEncoder(Compiled(model))


def test_latents_are_those_of_diffusers() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    noise = some_latents(2, 4, 3, 4, seed=2)
    with torch.no_grad():
        picture = VaeImageProcessor().preprocess(pixels.astype(np.float32) / 255)
        given = torch_pipeline().vae.encode(picture).latent_dist
    mean, std = given.mean.numpy() * SCALING, given.std.numpy() * SCALING
    np.testing.assert_allclose(encoder().encode(pixels), mean, atol=1e-5)
    np.testing.assert_allclose(encoder().encode(pixels, noise), mean + std * noise, atol=1e-5)


def test_pictures_and_noise_that_do_not_fit_are_refused() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(RequestError, match="uint8"):
        encoder().encode(pixels.astype(np.float32))
    with pytest.raises(RequestError, match="noise"):
        encoder().encode(pixels, np.zeros((1, 4, 3, 2), np.float32))


class Fixed:
    def __init__(self, **outputs: NDArray[Any]) -> None:
        self._outputs = outputs

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self._outputs


def test_encoder_trouble_is_named() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    nan = np.full((1, 4, 2, 2), np.nan, np.float32)
    with pytest.raises(SdvinoError, match="--precision f32"):
        VaeEncoder(Fixed(latents=nan)).encode(pixels)
    with pytest.raises(ModelFolderError, match="own sample"):
        VaeEncoder(Fixed(latents=nan)).encode(pixels, nan)
