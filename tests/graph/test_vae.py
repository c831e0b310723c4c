from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from openvino import opset13 as ops

from sdvino.errors import ModelFolderError
from sdvino.graph.vae import decoder_to_float, decoder_to_pixels, encoder_from_pixels
from tests.graph.exported import SCALING, Compiled, read, some_latents, torch_pipeline


@pytest.mark.parametrize("shift", [None, 0.25])
def test_pixels_are_those_of_diffusers(shift: float | None) -> None:
    latents = some_latents(2, 4, 8, 12)
    with torch.no_grad():
        unscaled = torch.from_numpy(latents) / SCALING + (0.0 if shift is None else shift)
        picture = torch_pipeline().vae.decode(unscaled).sample
    expected = VaeImageProcessor().postprocess(picture, output_type="np")

    model = read("vae_decoder")
    decoder_to_float(model, SCALING, shift)
    as_float = Compiled(model).infer({"latent_sample": latents})
    assert as_float["pixels"].dtype == np.float32
    np.testing.assert_allclose(as_float["pixels"], expected, atol=1e-5)

    model = read("vae_decoder")
    decoder_to_pixels(model, SCALING, shift)
    levels = Compiled(model).infer({"latent_sample": latents})
    assert levels["pixels"].dtype == np.uint8
    assert levels["pixels"].shape == (2, 64, 96, 3)
    assert levels["finite"].tolist() == [True, True]
    rounded = (expected * 255).round().astype(np.int16)
    off = np.abs(levels["pixels"].astype(np.int16) - rounded)
    assert off.max() <= 1  # float noise at an exact half of a level, no more
    assert (off > 0).mean() < 1e-3


def passing_decoder() -> ov.Model:
    """A decoder that gives its latents back, so that the added arithmetic is all there is."""
    latents = ops.parameter([-1, 3, -1, -1], ov.Type.f32, name="latent_sample")
    latents.output(0).set_names({"latent_sample"})
    same = ops.add(latents, np.float32(0.0))
    same.output(0).set_names({"sample"})
    return ov.Model([ops.result(same)], [latents], "passing")


def test_every_level_rounds_and_clamps_as_diffusers() -> None:
    model = passing_decoder()
    decoder_to_pixels(model, 1.0)
    # Halves of a level: numpy rounds them to the even neighbour, and so does diffusers.
    levels = np.arange(-2, 258, 0.25, dtype=np.float64)
    values = (levels / 255 * 2 - 1).astype(np.float32)
    latents = np.broadcast_to(values[None, None, None, :], (1, 3, 1, values.size)).copy()
    pixels = Compiled(model).infer({"latent_sample": latents})["pixels"]
    assert pixels.shape == (1, 1, values.size, 3)
    exact = np.clip(values / np.float32(2) + np.float32(0.5), 0, 1) * np.float32(255)
    ties = np.abs(exact % 1 - 0.5) < 1e-4
    expected = exact.round().astype(np.uint8)
    assert (expected[0], expected[-1]) == (0, 255)
    np.testing.assert_array_equal(pixels[0, 0, ~ties, 0], expected[~ties])
    assert np.abs(pixels[0, 0, :, 1].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_reported_per_picture(broken: float) -> None:
    latents = some_latents(2, 4, 4, 4)
    latents[1, 0, 0, 0] = broken
    model = read("vae_decoder")
    decoder_to_pixels(model, SCALING)
    assert Compiled(model).infer({"latent_sample": latents})["finite"].tolist() == [True, False]


def test_encoder_gives_scaled_mean_and_deviation() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    with torch.no_grad():
        picture = VaeImageProcessor().preprocess(pixels.astype(np.float32) / 255)
        distribution = torch_pipeline().vae.encode(picture).latent_dist
    model = read("vae_encoder")
    encoder_from_pixels(model, SCALING)
    output = Compiled(model).infer({"sample": pixels})
    assert output["latents"].shape == (2, 4, 4, 6)
    np.testing.assert_allclose(output["latents"], distribution.mean.numpy() * SCALING, atol=1e-5)
    np.testing.assert_allclose(output["latents_std"], distribution.std.numpy() * SCALING, atol=1e-5)


def sampling_encoder() -> ov.Model:
    picture = ops.parameter([-1, 3, -1, -1], ov.Type.f32, name="sample")
    picture.output(0).set_names({"sample"})
    same = ops.add(picture, np.float32(0.0))
    same.output(0).set_names({"latent_sample"})
    return ov.Model([ops.result(same)], [picture], "sampling")


def test_encoder_that_samples_by_itself_is_scaled_and_shifted() -> None:
    model = sampling_encoder()
    encoder_from_pixels(model, 0.5, 0.25)
    output = Compiled(model).infer({"sample": np.full((1, 2, 2, 3), 255, np.uint8)})
    np.testing.assert_allclose(output["latents"], np.full((1, 3, 2, 2), (1 - 0.25) * 0.5))
    assert "latents_std" not in output


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf"), 1e30])
def test_impossible_factors_are_refused(factor: float) -> None:
    with pytest.raises(ModelFolderError, match="scaling_factor"):
        decoder_to_pixels(read("vae_decoder"), factor)
    with pytest.raises(ModelFolderError, match="shift_factor"):
        decoder_to_pixels(read("vae_decoder"), 1.0, float("nan"))


def test_a_graph_that_is_no_decoder_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="no input 'latent_sample'"):
        decoder_to_pixels(read("vae_encoder"), SCALING)
