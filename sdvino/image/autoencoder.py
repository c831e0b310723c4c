"""The autoencoder: latents to pictures and back, one picture at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.errors import ModelFolderError, RequestError, SdvinoError
from sdvino.graph.protocol import InferenceComponent
from sdvino.image.tiling import OVERLAP, TILE, tiled_decode, to_levels


class VaeDecoder:
    """Latents to pictures, with a decoder prepared by `sdvino.graph.vae`.

    A graph from `decoder_to_pixels` serves `decode`; one from `decoder_to_float` serves everything.
    The component runs one picture (or tile) at a time: batches only multiply the memory.
    """

    def __init__(self, component: InferenceComponent, factor: int | None = None) -> None:
        """``factor``: pixels to a latent along each side; None does not look."""
        self._component = component
        self._factor = factor

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return uint8 [N, H, W, 3] for latents float32 [N, C, h, w], scaled as diffusers' are.

        Raises SdvinoError, naming the remedy, when the decoder gives values that are not numbers.
        """
        return np.concatenate([_as_levels(self._run(one)) for one in _singly(latents)])

    def decode_float(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 [N, H, W, 3] from 0 to 1; otherwise as `decode`."""
        return np.concatenate([_as_unit(self._run(one)) for one in _singly(latents)])

    def decode_tiled(
        self, latents: NDArray[np.float32], *, tile: int = TILE, overlap: int = OVERLAP
    ) -> NDArray[np.float32]:
        """Return float32 [N, H, W, 3] from 0 to 1, decoded in tiles; see `tiled_decode`.

        The component is asked for latents of `sdvino.image.tiling.tile_shape` and no other size.
        """
        return np.concatenate(
            [
                tiled_decode(self.decode_float, one, tile=tile, overlap=overlap)
                for one in _singly(latents)
            ]
        )

    def _run(self, latents: NDArray[np.float32]) -> NDArray[Any]:
        outputs = self._component.infer({"latent_sample": latents})
        if not np.all(outputs["finite"]):
            raise SdvinoError(
                "The VAE decoder gave values that are not numbers, which would be a black picture;"
                " run it in full precision with --precision f32, or with --device vae=CPU."
            )
        pixels = outputs["pixels"]
        if self._factor is not None:
            height, width = (side * self._factor for side in latents.shape[-2:])
            if pixels.shape != (1, height, width, 3):
                raise ModelFolderError(
                    f"The VAE decoder makes pixels of the shape {list(pixels.shape)} where a"
                    f" picture of {width} x {height} was due; get the model again."
                )
        return pixels


class VaeEncoder:
    """Pictures to latents, with an encoder prepared by `sdvino.graph.vae.encoder_from_pixels`."""

    def __init__(self, component: InferenceComponent) -> None:
        self._component = component

    def encode(
        self, pixels: NDArray[np.uint8], noise: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return latents float32 [N, C, h, w], scaled as diffusers' are, for uint8 [N, H, W, 3].

        The mean of the autoencoder's distribution, or with ``noise`` (unit normal, of the latents'
        shape) a sample of it. Raises SdvinoError when the encoder gives values that are not
        numbers, RequestError for other pixels or noise.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise RequestError(
                f"Pixels of type {pixels.dtype} and shape {list(pixels.shape)} cannot be encoded;"
                " give uint8 [N, H, W, 3]."
            )
        pictures = [self._run(pixels[i : i + 1], noise, i) for i in range(len(pixels))]
        latents = np.concatenate(pictures)
        if not np.isfinite(latents).all():
            raise SdvinoError(
                "The VAE encoder gave values that are not numbers;"
                " run it in full precision with --precision f32, or with --device vae=CPU."
            )
        return latents

    def _run(
        self, pixels: NDArray[np.uint8], noise: NDArray[np.float32] | None, index: int
    ) -> NDArray[np.float32]:
        outputs = self._component.infer({"sample": np.ascontiguousarray(pixels)})
        latents = np.array(outputs["latents"], np.float32)
        if noise is None:
            return latents
        if "latents_std" not in outputs:
            raise ModelFolderError(
                "This VAE encoder draws its own sample and takes no noise; convert the model again."
            )
        if noise[index : index + 1].shape != latents.shape:
            raise RequestError(
                f"The noise has the shape {list(noise.shape)};"
                f" give one of shape {list(latents.shape)} for each picture."
            )
        latents += outputs["latents_std"] * noise[index : index + 1]
        return latents


def _singly(latents: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    if latents.ndim != 4 or 0 in latents.shape:
        raise RequestError(
            f"Latents of shape {list(latents.shape)} cannot be decoded; give [N, C, h, w]."
        )
    latents = np.ascontiguousarray(latents, np.float32)
    return [latents[i : i + 1] for i in range(len(latents))]


def _as_levels(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    return np.array(pixels) if pixels.dtype == np.uint8 else to_levels(pixels)


def _as_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    unit = np.array(pixels, np.float32)
    if pixels.dtype == np.uint8:
        unit /= np.float32(255.0)
    return unit
