"""Guided predictions of a picture: which UNets it takes, and how they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.denoiser import Denoiser, Predict
from sdvino.diffusion.grid import Grid, Level
from sdvino.diffusion.guidance import Guidance, PredictBoth, interval_of_steps
from sdvino.errors import RequestError
from sdvino.request import ResolvedRequest
from sdvino.runtime.components import Components
from sdvino.runtime.defaults import guidance_mode_for
from sdvino.runtime.memory_plan import MemoryPlan
from sdvino.runtime.network import Branch, Network, NetworkPlan, both_in_one
from sdvino.runtime.remote import keep_on_device
from sdvino.runtime.timings import Timings, clock
from sdvino.runtime.waiting import result_of
from sdvino.settings import GuidanceMode, RunSettings, SpeedSettings

Array = NDArray[np.float32]


def guidance_mode(speed: SpeedSettings, settings: RunSettings) -> GuidanceMode:
    """Return how two predictions are run: as asked for, as measured, or as suits the device."""
    if speed.guidance_mode is not None:
        return speed.guidance_mode
    if settings.guidance_mode is not None:
        return settings.guidance_mode
    return guidance_mode_for(settings.for_component("unet").device)


def unet_plans(
    speed: SpeedSettings,
    memory: MemoryPlan,
    mode: GuidanceMode,
    *,
    guided: bool,
    text_apart: bool = False,
) -> list[NetworkPlan]:
    """Return the UNets that a picture takes: the one for guidance first, if it is another.

    A batch of two is a graph of its own; with a guidance interval single runs need theirs too.
    Raises RequestError for settings that exclude each other.
    """
    if memory.pieces > 1 and speed.cache_interval > 1:
        raise RequestError(
            "Step caching keeps the whole UNet in memory, which --low-memory or --max-memory rules"
            " out; leave one of them out."
        )
    single = NetworkPlan(
        streams=2 if guided and mode == "streams" else 1,
        token_downsampling=speed.token_downsampling,
        cache_interval=speed.cache_interval,
        cache_branch=speed.cache_branch,
        pieces=memory.pieces,
        text_apart=text_apart,
    )
    if not guided or mode != "batch":
        return [single]
    pair = replace(single, batch=2)
    return [pair] if speed.guidance_interval is None else [pair, single]


class PictureDenoiser:
    """Makes the `Denoiser` of each picture of a request.

    A context manager: leaving it waits for what `load_ahead` began.
    """

    def __init__(
        self,
        components: Components,
        request: ResolvedRequest,
        grid: Grid,
        memory: MemoryPlan,
        timings: Timings,
    ) -> None:
        self._components = components
        self._request = request
        self._grid = grid
        self._memory = memory
        self._timings = timings
        self._mode = guidance_mode(request.speed, components.settings)
        factor = components.folder.vae_scale_factor
        self._size = request.height // factor, request.width // factor
        self._pool = ThreadPoolExecutor(1, "sdvino-load")
        self._loading: Future[list[Network]] | None = None

    def __enter__(self) -> PictureDenoiser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)

    def load_ahead(self, *, guided: bool) -> None:
        """Begin to load the UNets in a thread if the memory plan allows; `denoiser` waits for it.

        Much of either is the work of a single core.
        """
        components = self._components
        # What makes the text's keys and values comes before a UNet that has its text apart.
        if self._memory.load_ahead and components.observe is None and not components.text_apart:
            self._loading = self._pool.submit(components.unets, self._size, self._plans(guided))

    def _plans(self, guided: bool) -> list[NetworkPlan]:
        speed, memory = self._request.speed, self._memory
        return unet_plans(speed, memory, self._mode, guided=guided, text_apart=self._apart)

    @property
    def _apart(self) -> bool:
        # An observed UNet takes what the folder's own takes, so that its inputs fit any other.
        return self._components.text_apart and self._components.observe is None

    def _wait(self) -> None:
        """Wait for what was begun; raises what it raised."""
        if self._loading is not None:
            result_of(self._loading)
            self._loading = None

    def denoiser(self, cond: Mapping[str, Array], uncond: Mapping[str, Array] | None) -> Denoiser:
        """Load what is needed and return the denoiser of a picture with these conditions."""
        request, guided = self._request, uncond is not None
        plans = self._plans(guided)
        if self._apart:
            with clock(self._timings, "text"):
                keys = self._components.text_keys()
                cond, uncond = keys(cond), None if uncond is None else keys(uncond)
                if self._memory.release_text:
                    self._components.release_text_keys()
        with clock(self._timings, "load"):
            self._wait()
            unets = self._components.unets(self._size, plans)
        interval = request.speed.guidance_interval if guided else None
        branch = Branch(keep_on_device(unets[-1].hardware, cond))
        guidance = Guidance(
            self._one(unets[-1], branch),
            both=None if uncond is None else self._both(unets[0], branch, cond, uncond),
            guidance_scale=request.guidance_scale if guided else 1.0,
            guidance_rescale=request.guidance_rescale,
            interval=None if interval is None else interval_of_steps(self._grid, *interval),
        )
        return Denoiser(guidance, self._grid.prediction_type)

    def _one(self, unet: Network, branch: Branch) -> Predict:
        def predict(x_in: Array, level: Level, /) -> Array:
            self._timings.unet_evaluations += 1
            return unet.evaluate(x_in, level.t, level.step, [branch])[0]

        return predict

    def _both(
        self,
        unet: Network,
        branch: Branch,
        cond: Mapping[str, Array],
        uncond: Mapping[str, Array],
    ) -> PredictBoth:
        if unet.batch == 2:
            both = both_in_one(cond, uncond)
            pair = [Branch(keep_on_device(unet.hardware, both))]
        else:
            pair = [branch, Branch(keep_on_device(unet.hardware, uncond))]

        def predict(x_in: Array, level: Level) -> tuple[Array, Array]:
            self._timings.unet_evaluations += 2
            if len(pair) == 2:
                first, second = unet.evaluate(x_in, level.t, level.step, pair)
                return first, second
            twice = np.concatenate([x_in, x_in])
            (result,) = unet.evaluate(twice, level.t, level.step, pair)
            return result[:1], result[1:]

        return predict
