"""The queue of pictures to decode, with decoders that take as long as they are told."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from sdvino.errors import SdvinoError
from sdvino.image.codec import DecodeQueue, decodes_aside
from sdvino.outputs import Array
from sdvino.request import PictureJob
from sdvino.runtime.memory_plan import MemoryPlan
from sdvino.runtime.timings import Timings


def job(index: int) -> PictureJob:
    return PictureJob(index=index, prompt_index=0, prompt="", negative_prompt=None, seed=index)


def latents(value: float) -> Array:
    return np.full((1, 4, 2, 2), value, np.float32)


def test_a_picture_is_decoded_while_the_next_is_made() -> None:
    timings, may_go, threads = Timings(), threading.Event(), set()

    def decode(x: Array, spent: Timings) -> Any:
        threads.add(threading.get_ident())
        assert may_go.wait(60)
        spent.decode += 1.0
        return x

    with DecodeQueue(decode, timings, aside=True) as queue:
        assert list(queue.put(job(0), latents(0))) == []  # and here the next one denoises
        may_go.set()
        events = [*queue.put(job(1), latents(1)), *queue.rest()]
    assert [event.job.index for event in events] == [0, 1]
    assert [float(np.max(event.latents)) for event in events] == [0.0, 1.0]
    assert threading.get_ident() not in threads
    assert timings.decode == 2.0


def test_at_once_without_a_thread() -> None:
    def decode(x: Array, spent: Timings) -> Any:
        return threading.get_ident()

    with DecodeQueue(decode, Timings(), aside=False) as queue:
        (event,) = queue.put(job(0), latents(0))
        assert event.pixels == threading.get_ident()
        assert list(queue.rest()) == []


def test_what_goes_wrong_aside_comes_out() -> None:
    def decode(x: Array, spent: Timings) -> Any:
        raise SdvinoError("Not a number; use f32.")

    def run() -> None:
        with DecodeQueue(decode, Timings(), aside=True) as queue:
            list(queue.put(job(0), latents(0)))
            list(queue.rest())

    with pytest.raises(SdvinoError, match="f32"):
        run()


def test_leaving_drops_what_waits() -> None:
    decoded: list[float] = []
    may_go = threading.Event()

    def decode(x: Array, spent: Timings) -> Any:
        assert may_go.wait(60)
        decoded.append(float(np.max(x)))
        return x

    with DecodeQueue(decode, Timings(), aside=True) as queue:
        list(queue.put(job(0), latents(0)))
        stream = queue.put(job(1), latents(1))
        may_go.set()
        next(stream)
    assert decoded in ([0.0], [0.0, 1.0])


def test_only_for_throughput_and_with_room_for_both() -> None:
    roomy, tight = MemoryPlan(), MemoryPlan(release_models=True)
    assert decodes_aside("throughput", 2, roomy)
    assert not decodes_aside("throughput", 1, roomy)
    assert not decodes_aside("throughput", 2, tight)
    assert not decodes_aside("latency", 2, roomy)
