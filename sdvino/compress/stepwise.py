"""A model compressed, or evaluated, part by part: one part is in memory at a time.

Each part is calibrated on what the float parts before it give for the calibration inputs; that
waits on the disk. So the result is what compressing the whole at once would give, where a layer's
compression depends on its own inputs and outputs alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.ir import read_ir
from sdvino.compress.parts import Cuts, Joiner, Part, Value

Sample = Mapping[str, NDArray[Any]]
Progress = Callable[[float], None]
#: Compresses a model on calibration inputs, and tells the share done.
Compress = Callable[[ov.Model, Sequence[Sample], Progress], ov.Model]

#: What a part may take when it is quantized, beside the libraries: a laptop's share. More parts
#: take less and cost more time.
PART_BYTES = 2_500_000_000


def compress_in_parts(
    read: Callable[[], ov.Model],
    ends: Sequence[str],
    samples: Sequence[Sample],
    compress: Compress,
    folder: Path,
    progress: Progress,
) -> ov.Model:
    """Return the model that ``read`` gives, anew each time, with its parts compressed.

    ``ends`` are those of `sdvino.compress.parts.choose_ends`; ``folder`` is empty, and holds what
    flows between the parts, and the finished ones, meanwhile.
    """
    flow = _Flow(folder)
    readers = Cuts(read(), ends).last_reader()
    ports: list[tuple[Mapping[str, Value], tuple[Value, ...]]] = []
    for index in range(len(ends) + 1):
        part = Cuts(read(), ends).extract(index)
        inputs = _Inputs(part, samples, flow)
        _run(part, inputs, [value for value in part.given if value in readers], flow)
        model = compress(part.model, inputs, _share_of(progress, index, len(ends) + 1))
        ov.save_model(model, _xml(folder, index), compress_to_fp16=True)
        ports.append((part.crossing, part.given))
        del part, inputs, model
        gc.collect()
        flow.drop(value for value, last in readers.items() if last == index)
    joiner = Joiner(read())
    for index, (crossing, given) in enumerate(ports):
        joiner.add(Part(read_ir(_xml(folder, index)), crossing, given))
    return joiner.finish()


class PartedModel:
    """A float model of which one part at a time is compiled; evaluated on many inputs at once."""

    def __init__(self, model: ov.Model, ends: Sequence[str]) -> None:
        """``ends`` are those of `sdvino.compress.parts.choose_ends`. ``model`` is consumed."""
        cuts = Cuts(model, ends)
        self._readers = cuts.last_reader()
        self._parts = [cuts.extract(index) for index in range(len(ends) + 1)]

    def evaluate(self, samples: Sequence[Sample], folder: Path) -> list[NDArray[Any]]:
        """Return the model's last output for each of ``samples``.

        ``folder`` is empty, and holds what flows between the parts meanwhile.
        """
        flow = _Flow(folder)
        for index, part in enumerate(self._parts):
            _run(part, _Inputs(part, samples, flow), part.given, flow)
            flow.drop(value for value, last in self._readers.items() if last == index)
        output = self._parts[-1].given[-1]
        return [flow.get(output, sample) for sample in range(len(samples))]


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


def _run(part: Part, inputs: Sequence[Sample], wanted: Sequence[Value], flow: _Flow) -> None:
    """Evaluate a part in float on every input and keep ``wanted`` of what it gives."""
    if not wanted:
        return
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(part.model, "CPU", properties).create_infer_request()
    outputs = [(value, part.given.index(value)) for value in wanted]
    for index in range(len(inputs)):
        request.infer(dict(inputs[index]), share_inputs=True)
        for value, output in outputs:
            flow.put(value, index, request.get_output_tensor(output).data)


def _xml(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.xml"


def _share_of(progress: Progress, index: int, count: int) -> Progress:
    return lambda share: progress((index + share) / count)
