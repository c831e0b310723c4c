"""Small pictures of latents while they are still being denoised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import RequestError
from sdvino.graph.protocol import InferenceComponent
from sdvino.image.tiling import to_levels

#: What a latent channel of Stable Diffusion 1.x adds to red, green and blue (-1 .. 1): a linear fit
#: to its autoencoder. Source: Keturn, "Decoding latents to RGB without upscaling", Hugging Face
#: forum, 2022.
SD1_LATENT_TO_RGB = np.array(
    [
        [0.298, 0.207, 0.208],
        [0.187, 0.286, 0.173],
        [-0.158, 0.189, 0.264],
        [-0.184, -0.271, -0.473],
    ],
    np.float32,
)


class Previewer:
    """Makes previews with a tiny decoder, or without one by a linear map to colours.

    ``component`` is a folder's ``tiny_vae`` prepared by `decoder_to_pixels` with a scaling factor
    of 1: it takes ``latent_sample``, scaled as diffusers' latents are, and gives ``pixels``. The
    linear map was fitted to Stable Diffusion 1.x; with another autoencoder the colours are not
    those of the picture, but its shapes are there.
    """

    def __init__(self, component: InferenceComponent | None = None) -> None:
        self._component = component

    def preview(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return a preview uint8 [N, H, W, 3] of latents float32 [N, C, h, w].

        H and W are those of the picture with a tiny decoder, h and w without one. Values that are
        not numbers give a wrong picture and never an error: a preview must not end the work.
        Raises RequestError for latents that no preview can show.
        """
        if self._component is None:
            return linear_preview(latents)
        latents = np.nan_to_num(np.ascontiguousarray(latents, np.float32))
        pictures = [
            np.array(self._component.infer({"latent_sample": latents[i : i + 1]})["pixels"])
            for i in range(len(latents))
        ]
        return np.concatenate(pictures)


def linear_preview(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a preview uint8 [N, h, w, 3] of Stable Diffusion 1.x latents float32 [N, 4, h, w]."""
    if latents.ndim != 4 or latents.shape[1] != len(SD1_LATENT_TO_RGB):
        raise RequestError(
            f"Latents of shape {list(latents.shape)} have no linear preview; give [N, 4, h, w]."
        )
    finite = np.nan_to_num(latents, posinf=0.0, neginf=0.0)
    signed = np.einsum("nchw,cr->nhwr", finite, SD1_LATENT_TO_RGB)
    return to_levels(signed * np.float32(0.5) + np.float32(0.5))
