"""Latents to pictures: whole, in tiles or by the tiny decoder, at once or while others denoise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from sdvino.image.autoencoder import VaeDecoder
from sdvino.image.tiling import OVERLAP, tile_shape, to_levels
from sdvino.outputs import Array, OutputType, PictureEvent
from sdvino.request import PictureJob
from sdvino.runtime.components import Components
from sdvino.runtime.memory_plan import MemoryPlan
from sdvino.runtime.timings import Timings, clock
from sdvino.runtime.waiting import result_of
from sdvino.settings import PerformanceHint

Pixels = NDArray[Any]


def decodes_aside(hint: PerformanceHint, pictures: int, memory: MemoryPlan) -> bool:
    """Return whether one picture is decoded while the next is denoised.

    It takes both models in memory, and the single picture later: for throughput only.
    """
    return hint == "throughput" and pictures > 1 and not memory.release_models


class PictureDecoder:
    """Decodes one picture's finished latents as a memory plan says."""

    def __init__(
        self, components: Components, memory: MemoryPlan, output_type: OutputType, *, tiny: bool
    ) -> None:
        self._components = components
        self._memory = memory
        self._output_type = output_type
        self._tiny = tiny

    def __call__(self, latents: Array, timings: Timings) -> Pixels | None:
        """Return uint8 or float32 [H, W, 3] for latents float32 [1, C, h, w]; None for none."""
        if self._output_type == "latent":
            return None
        if self._memory.release_models:
            self._components.release("unet")
        levels = self._output_type == "pil"
        tile = None if self._tiny else self._memory.tile
        try:
            with clock(timings, "load"):
                component = self._component(latents, tile, levels)
                decoder = VaeDecoder(component, self._components.folder.vae_scale_factor)
            with clock(timings, "decode"):
                if tile is None and levels:
                    pixels: Pixels = decoder.decode(latents)[0]
                    return pixels
                if tile is None:
                    floats: Pixels = decoder.decode_float(latents)[0]
                    return floats
                overlap = min(OVERLAP, tile // 4)
                picture = decoder.decode_tiled(latents, tile=tile, overlap=overlap)[0]
                return to_levels(picture) if levels else picture
        finally:
            if self._memory.release_models:
                self._components.release("vae_decoder", "tiny_vae")

    def _component(self, latents: Array, tile: int | None, levels: bool) -> Any:
        height, width = latents.shape[-2:]
        if self._tiny:
            return self._components.tiny_vae(height, width)
        if tile is not None:
            height, width = tile_shape(height, width, tile=tile, overlap=min(OVERLAP, tile // 4))
        return self._components.vae_decoder(height, width, pixels=levels and tile is None)


class DecodeQueue:
    """Gives finished pictures in order; with ``aside`` a thread decodes while the caller goes on.

    A context manager: leaving it waits for the picture being decoded, and drops those that wait.
    """

    def __init__(
        self,
        decode: Callable[[Array, Timings], Pixels | None],
        timings: Timings,
        *,
        aside: bool,
    ) -> None:
        self._decode = decode
        self._timings = timings
        self._pool = ThreadPoolExecutor(1, "sdvino-decode") if aside else None
        self._waiting: deque[Future[tuple[PictureEvent, Timings]]] = deque()

    def __enter__(self) -> DecodeQueue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, job: PictureJob, latents: Array) -> Iterator[PictureEvent]:
        """Take a picture's finished latents; yield what pictures are ready, at most one late."""
        if self._pool is None:
            pixels = self._decode(latents, self._timings)
            yield PictureEvent(job=job, latents=latents, pixels=pixels)
            return
        self._waiting.append(self._pool.submit(self._aside, job, latents))
        while len(self._waiting) > 1 or (self._waiting and self._waiting[0].done()):
            yield self._next()

    def rest(self) -> Iterator[PictureEvent]:
        """Yield the pictures still being decoded."""
        while self._waiting:
            yield self._next()

    def _aside(self, job: PictureJob, latents: Array) -> tuple[PictureEvent, Timings]:
        timings = Timings()
        pixels = self._decode(latents, timings)
        return PictureEvent(job=job, latents=latents, pixels=pixels), timings

    def _next(self) -> PictureEvent:
        event, timings = result_of(self._waiting.popleft())
        self._timings.load += timings.load
        self._timings.decode += timings.decode
        return event
