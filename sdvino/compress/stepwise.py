"""A model compressed, or evaluated, part by part: one part is in memory at a time.

What flows from part to part of an evaluation waits on the disk. Compression needs no evaluation, so
its parts only follow each other.
"""

from __future__ import annotations

import gc
from collections import Counter, UserDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.compress.parts import Joiner, cut_at_ends
from sdvino.compress.statistics import STATISTICS, Recorder, add_statistics
from sdvino.graph.cut import Ports, Value, keep_stage, split
from sdvino.graph.saving import read_ir
from sdvino.runtime.memory import return_memory
from sdvino.runtime.network import Network

Array = NDArray[Any]
Sample = Mapping[str, Array]
Progress = Callable[[float], None]
#: Compresses a part of a model, whose inputs stand for these values of the whole.
Compress = Callable[[ov.Model, Mapping[str, Value]], ov.Model]

#: What a part may take when it is quantized, beside the libraries: a laptop's share. More parts
#: take less and cost more time.
PART_BYTES = 2_500_000_000
_EXACT: Mapping[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
#: The last output of a model that is evaluated.
_OUTPUT = "evaluated"


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
    joined: list[Ports] = []
    for index in range(len(ends) + 1):
        part = read()
        joined.append(keep_stage(part, cut_at_ends(part, ends), index))
        part = compress(part, joined[-1].taken)
        ov.save_model(part, _xml(folder, index), compress_to_fp16=True)
        del part
        gc.collect()
        return_memory()
        progress((index + 1) / (len(ends) + 1))
    joiner = Joiner(read())
    for index, ports in enumerate(joined):
        joiner.add(read_ir(_xml(folder, index)), ports)
    return joiner.finish()


class Evaluator:
    """A float model evaluated on many inputs at once; of its parts one at a time is compiled."""

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
        model.outputs[-1].get_tensor().add_names({_OUTPUT})
        parts = split(model, lambda whole: cut_at_ends(whole, ends))
        self._recorder = recorder
        if recorder is not None:
            for part, ports in parts:
                recorder.points += add_statistics(part, ports.taken, recorder.points)
        #: How many parts read what crosses.
        self._readers = Counter(name for _, ports in parts for name in ports.taken)
        self._network = Network([Graph(part, properties) for part, _ in parts], in_turn=True)

    def evaluate(
        self,
        samples: Sequence[Sample],
        folder: Path,
        recorded: Collection[int] | None = None,
        progress: Progress = lambda share: None,
    ) -> list[Array]:
        """Return the model's last output for each of ``samples``.

        ``folder`` holds what flows between the parts meanwhile. ``recorded`` are the numbers of the
        samples that the recorder keeps the statistics of; None: all.
        """
        kept = range(len(samples)) if recorded is None else sorted(recorded)
        rows: dict[int, Array] = {}
        if self._recorder is not None and kept and self._recorder.points:
            rows = dict(zip(kept, self._recorder.rows(len(kept)), strict=True))
        pools = [
            _Pool(sample, folder / str(number), self._readers, rows.get(number))
            for number, sample in enumerate(samples)
        ]
        self._network.run(pools, progress=progress)
        return [pool[_OUTPUT] for pool in pools]


class Graph:
    """A graph in memory that is compiled for the CPU when it runs; a `runtime.network.Stage`."""

    def __init__(self, model: ov.Model, properties: Mapping[str, Any]) -> None:
        self.input_names = [frozenset(port.get_names()) for port in model.inputs]
        self._model = model
        self._properties = dict(properties)
        self._request: ov.InferRequest | None = None

    def infer(self, inputs: Sample) -> dict[str, Array]:
        """Return the outputs by name: views that the next call writes again."""
        if self._request is None:
            compiled = ov.Core().compile_model(self._model, "CPU", self._properties)
            self._request = compiled.create_infer_request()
        self._request.infer(dict(inputs), share_inputs=True)
        return {
            name: self._request.get_output_tensor(index).data
            for index, port in enumerate(self._model.outputs)
            for name in port.get_names()
        }

    def infer_each(
        self, inputs: Sequence[Sample], *, together: bool = False
    ) -> list[dict[str, Array]]:
        """Return the outputs for each of ``inputs``, which are run one after the other."""
        return [
            {name: np.array(value) for name, value in self.infer(given).items()} for given in inputs
        ]

    def unload(self) -> None:
        """Let go of what was compiled."""
        self._request = None


class _Pool(UserDict[str, Array]):
    """The tensors of one evaluation: what flows between parts is in files, until it was read."""

    def __init__(
        self, sample: Sample, stem: Path, readers: Mapping[str, int], row: Array | None
    ) -> None:
        """Statistics go to the file's ``row``, if there is one; ``stem`` begins files' names."""
        super().__init__()
        self.data.update(sample)
        self._left = dict(readers)
        self._stem = stem
        self._row = row

    def __setitem__(self, name: str, array: Array) -> None:
        if name in self._left:
            np.save(self._file(name), array)
            self.data[name] = np.empty(0)  # in its place
        elif name == _OUTPUT:
            self.data[name] = array
        elif name == STATISTICS and self._row is not None:
            self._row[: len(array)] = array
            self._row = self._row[len(array) :]

    def __getitem__(self, name: str) -> Array:
        if name not in self._left:
            return self.data[name]
        array: Array = np.load(self._file(name), allow_pickle=False)
        self._left[name] -= 1
        if not self._left[name]:
            self._file(name).unlink()
        return array

    def _file(self, name: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{name}.npy")


def _xml(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.xml"
