from __future__ import annotations

import numpy as np
import pytest
import torch

from sdvino.errors import RequestError
from sdvino.graph.vae import decoder_to_pixels
from sdvino.image.preview import Previewer, linear_preview
from tests.graph.exported import Compiled, some_latents, tiny_decoder, torch_tiny


@pytest.mark.slow
def test_a_tiny_decoder_shows_what_it_shows_in_diffusers() -> None:
    model = tiny_decoder()
    decoder_to_pixels(model, 1.0)
    latents = some_latents(2, 4, 4, 6)
    with torch.no_grad():
        expected = (torch_tiny().decode(torch.from_numpy(latents)).sample / 2 + 0.5).clamp(0, 1)
    preview = Previewer(Compiled(model)).preview(latents)
    assert preview.shape == (2, 32, 48, 3)
    levels = expected.permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(preview - levels).max() < 0.51
    latents[0, 0, 0, 0] = np.nan
    assert Previewer(Compiled(model)).preview(latents).shape == (2, 32, 48, 3)


def test_without_one_the_colours_are_mapped() -> None:
    latents = np.zeros((1, 4, 3, 5), np.float32)
    assert np.unique(linear_preview(latents)).tolist() == [128]
    latents[:, 0] = 2.0  # the channel of brightness
    latents[:, 3, 0, 0] = np.nan
    preview = Previewer().preview(latents)
    assert preview.shape == (1, 3, 5, 3)
    assert preview.dtype == np.uint8
    assert preview.min() > 150
    with pytest.raises(RequestError, match="linear preview"):
        linear_preview(np.zeros((1, 16, 3, 5), np.float32))
