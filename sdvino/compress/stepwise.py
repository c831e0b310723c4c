"""A model compressed, or evaluated, part by part: one part is in memory at a time.

What flows from part to part of an evaluation waits on the disk. Compression needs no evaluation, so
its parts only follow each other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.parts import Cuts, Joiner, Part, Value
from sdvino.compress.statistics import Point, Recorder, add_statistics
from sdvino.graph.saving import read_ir
from sdvino.runtime.memory import return_memory

Sample = Mapping[str, NDArray[Any]]
Progress = Callable[[float], None]
#: Compresses a part of a model, whose inputs stand for these values of the whole.
Compress = Callable[[ov.Model, Mapping[str, Value]], ov.Model]

#: What a part may take when it is quantized, beside the libraries: a laptop's share. More parts
#: take less and cost more time.
PART_BYTES = 2_500_000_000
_EXACT: Mapping[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}


def compress_in_parts(
    read: Callable[[], ov.Model],
    ends: Sequence[str],
    compress: Compress,
    folder: Path,
    progress: Progress,
) -> ov.Model:
    """Return the model that ``read`` gives, anew each time, with its parts compressed.

    ``ends`` are those of `sdvino.compress.parts.choose_ends`; ``folder`` is empty, and holds the
    finished parts meanwhile.
    """
    ports: list[tuple[Mapping[str, Value], tuple[Value, ...]]] = []
    for index in range(len(ends) + 1):
        part = Cuts(read(), ends).extract(index)
        model = compress(part.model, part.crossing)
        ov.save_model(model, _xml(folder, index), compress_to_fp16=True)
        ports.append((part.crossing, part.given))
        del part, model
        gc.collect()
        return_memory()
        progress((index + 1) / (len(ends) + 1))
    joiner = Joiner(read())
    for index, (crossing, given) in enumerate(ports):
        joiner.add(Part(read_ir(_xml(folder, index)), crossing, given))
    return joiner.finish()


class PartedModel:
    """A float model of which one part at a time is compiled; evaluated on many inputs at once."""

    def __init__(
        self,
        model: ov.Model,
        ends: Sequence[str] = (),
        *,
        properties: Mapping[str, Any] = _EXACT,
        recorder: Recorder | None = None,
    ) -> None:
        """``ends`` are those of `sdvino.compress.parts.choose_ends`; none: it stays whole.

        ``properties`` are OpenVINO's. With a ``recorder``, whose shapes are static, evaluations
        tell what they are like. ``model`` is consumed.
        """
        cuts = Cuts(model, ends)
        self._readers = cuts.last_reader()
        self._parts = [cuts.extract(index) for index in range(len(ends) + 1)]
        self._properties = dict(properties)
        self._recorder = recorder
        self._points: list[list[Point]] = []
        self._whole: ov.InferRequest | None = None
        if recorder is not None:
            for part in self._parts:
                self._points.append(add_statistics(part.model, part.crossing, recorder.points))
                recorder.points += self._points[-1]

    def evaluate(
        self,
        samples: Sequence[Sample],
        folder: Path,
        recorded: Collection[int] | None = None,
        progress: Progress = lambda share: None,
    ) -> list[NDArray[Any]]:
        """Return the model's last output for each of ``samples``.

        ``folder`` holds what flows between the parts meanwhile. ``recorded`` are the numbers of the
        samples that the recorder keeps the statistics of; None: all.
        """
        kept = range(len(samples)) if recorded is None else sorted(recorded)
        rows: dict[int, Any] = {}
        if self._recorder is not None and kept and self._recorder.points:
            rows = dict(zip(kept, self._recorder.rows(len(kept)), strict=True))
        flow = _Flow(folder)
        results: list[NDArray[Any]] = []
        for index, part in enumerate(self._parts):
            request = self._request(part)
            inputs = _Inputs(part, samples, flow)
            for sample in range(len(samples)):
                request.infer(dict(inputs[sample]), share_inputs=True)
                for output, value in enumerate(part.given):
                    if value in self._readers:
                        flow.put(value, sample, request.get_output_tensor(output).data)
                if index + 1 == len(self._parts):
                    output = len(part.given) - 1
                    results.append(np.array(request.get_output_tensor(output).data))
                if sample in rows and self._points[index]:
                    measured = request.get_output_tensor(len(part.given)).data
                    start = 3 * self._points[index][0].start
                    rows[sample][start : start + len(measured)] = measured
                progress((index + (sample + 1) / len(samples)) / len(self._parts))
            flow.drop(value for value, reader in self._readers.items() if reader == index)
            del request  # before the next part is compiled
            return_memory()
        return results

    def _request(self, part: Part) -> ov.InferRequest:
        """Return what evaluates ``part``; of a whole model it is kept."""
        if self._whole is not None:
            return self._whole
        request = (
            ov.Core().compile_model(part.model, "CPU", self._properties).create_infer_request()
        )
        if len(self._parts) == 1:
            self._whole = request
        return request


class _Flow:
    """The values that flow from part to part, for each calibration input a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[Value, int] = {}
        self._samples = 0

    def put(self, value: Value, sample: int, array: NDArray[Any]) -> None:
        self._numbers.setdefault(value, len(self._numbers))
        self._samples = max(self._samples, sample + 1)
        np.save(self._file(value, sample), array)

    def get(self, value: Value, sample: int) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self._file(value, sample), allow_pickle=False)
        return array

    def drop(self, values: Iterable[Value]) -> None:
        """Remove ``values``: nothing reads them any more."""
        for value in values:
            for sample in range(self._samples):
                self._file(value, sample).unlink(missing_ok=True)

    def _file(self, value: Value, sample: int) -> Path:
        return self._folder / f"value-{self._numbers[value]}-{sample}.npy"


class _Inputs(Sequence[Sample]):
    """The inputs of one part: those of the whole that it reads, and what crosses into it."""

    def __init__(self, part: Part, samples: Sequence[Sample], flow: _Flow) -> None:
        self._samples, self._flow, self._crossing = samples, flow, part.crossing
        names = [port.get_names() for port in part.model.inputs]
        self._own = [name for name in samples[0] if any(name in found for found in names)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        sample = {name: self._samples[index][name] for name in self._own}
        crossing = {name: self._flow.get(value, index) for name, value in self._crossing.items()}
        return sample | crossing


def _xml(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.xml"
