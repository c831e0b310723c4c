"""One graph on one device: load, unload, infer."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from sdvino.errors import DeviceError, ModelFolderError, SdvinoError
from sdvino.graph.walk import check_folding
from sdvino.inputs.digests import digest_of, wrong_file
from sdvino.inputs.ir import quantizes_activations, read_xml
from sdvino.runtime.cache import CompiledCache, default_cache_dir, graph_key
from sdvino.runtime.compiling import Change, Compiler, key_of_files, rewrite_for
from sdvino.runtime.core import device_facts, shared_core, short_reason
from sdvino.runtime.properties import (
    compile_properties,
    hardware_of,
    normalize_device,
    precision_in,
)
from sdvino.runtime.remote import DeviceArray
from sdvino.settings import DeviceSettings

Array = NDArray[Any]

#: Milliseconds between looks at the keyboard while a graph runs.
_WAIT_MS = 100


class Checks(Protocol):
    """Looks at what components give; see `sdvino.runtime.guard.Guard`."""

    def check(
        self,
        component: Component,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        settings: DeviceSettings,
    ) -> Mapping[str, Array]:
        """Return ``outputs``, computed under ``settings``, or better ones where they are wrong."""
        ...


class Component:
    """A graph, compiled for one device when loaded.

    ``infer`` takes and gives arrays by tensor name. Every thread has an inference request of its
    own, so with ``num_streams`` above 1 several threads may call it at once.
    """

    def __init__(
        self,
        name: str,
        xml_path: Path,
        settings: DeviceSettings | None = None,
        *,
        core: ov.Core | None = None,
        prepare: Change | None = None,
        keep_graph: bool = False,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the component; nothing is read before `load`.

        ``prepare`` changes the graph in memory before it is compiled; an `sdvino.graph.edit.Edit`
        loads fastest from the cache (see sdvino.runtime.compiling).
        ``keep_graph`` is for what is loaded often: the edited graph stays after `unload`, without
        its weights, which are a mapped file. ``sha256`` is what the files should be, by name, where
        that is known: others are refused.
        """
        self.name = name
        self.xml_path = Path(xml_path)
        self.settings = DeviceSettings() if settings is None else settings
        self._core = core
        self._prepare = prepare
        self._keep_graph = keep_graph
        self._sha256 = {} if sha256 is None else sha256
        self._graph: ov.Model | None = None
        #: Sees every result before the caller does, and may run the graph elsewhere instead.
        self.guard: Checks | None = None
        self._hardware: tuple[str, ...] = ()
        self._precision: str | None = None
        self._lock = threading.Lock()
        self._compiled: ov.CompiledModel | None = None
        self._inputs: dict[str, int] = {}
        self._input_ports: list[tuple[str, np.dtype[Any]]] = []
        self._outputs: list[tuple[int, tuple[str, ...]]] = []
        self._requests = threading.local()

    @property
    def loaded(self) -> bool:
        """Whether the graph is compiled and in memory."""
        return self._compiled is not None

    @property
    def compiled(self) -> ov.CompiledModel:
        """The compiled model; loads it when need be."""
        with self._lock:  # another thread may unload it as soon as this one lets go
            if self._compiled is None:
                self._set_compiled(self._compile())
            assert self._compiled is not None
            return self._compiled

    @property
    def hardware(self) -> tuple[str, ...]:
        """The devices that it may run on: CPU, GPU.1 ...; loads the graph when need be."""
        self.load()
        return self._hardware

    @property
    def precision(self) -> str | None:
        """The arithmetic of its float layers; None where the device chose it, or several did."""
        self.load()
        return self._precision

    def change(self, settings: DeviceSettings) -> None:
        """Run with other settings from the next `infer` on."""
        self.unload()
        self.settings = settings

    def twin(self, settings: DeviceSettings) -> Component:
        """Return the same graph under other settings, not loaded and not guarded."""
        return Component(
            self.name,
            self.xml_path,
            settings,
            core=self._core,
            prepare=self._prepare,
            sha256=self._sha256,
        )

    @property
    def input_names(self) -> tuple[frozenset[str], ...]:
        """The names of each input; loads the graph when need be."""
        return tuple(frozenset(port.get_names()) for port in self.compiled.inputs)

    def load(self) -> None:
        """Read, edit and compile the graph; nothing happens when that was done before.

        Raises ModelFolderError when the files are no graph or do not take the edit, DeviceError
        when the device is not there or cannot compile it.
        """
        _ = self.compiled

    def read(self) -> ov.Model:
        """Read and edit the graph without compiling it; raises as `load` does."""
        return self._read(shared_core() if self._core is None else self._core)

    def unload(self) -> None:
        """Give the memory back; the next `infer` loads again."""
        with self._lock:
            self._compiled = None
            self._requests = threading.local()

    def infer(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the graph on ``inputs``, arrays by any of a tensor's names; loads when need be.

        Contiguous arrays of the tensor's own dtype are read in place, others are converted. The
        arrays returned are views of buffers that the same thread's next call writes again.
        Ctrl-C stops the run. Raises SdvinoError when an input is missing, unknown or of another
        shape, or the device fails.
        """
        return self.infer_each([inputs])[0]

    def infer_each(
        self, inputs: Sequence[Mapping[str, Array]], *, together: bool = False
    ) -> list[Mapping[str, Array]]:
        """Run the graph once for each of ``inputs``, one after the other or all ``together``.

        Each has a request of its own, so the arrays returned are all valid until the same thread's
        next call. Running together is faster where the component has as many streams. Otherwise as
        `infer`.
        """
        settings = self.settings
        one = len(inputs) == 1
        results = self._evaluate(inputs, together)
        if self.guard is None:
            return results
        for given, outputs in zip(inputs, results, strict=True):
            checked = self.guard.check(self, given, outputs, settings)
            if checked is not outputs:  # a second run, elsewhere, may have written over the others
                if one:
                    return [checked]
                return [{k: np.array(v) for k, v in self.infer(given).items()} for given in inputs]
        return results

    def _evaluate(
        self, inputs: Sequence[Mapping[str, Array]], together: bool
    ) -> list[Mapping[str, Array]]:
        compiled = self.compiled  # what it reads goes with it, if another thread unloads
        requests = [self._request(compiled, number) for number in range(len(inputs))]
        held = [self._set_inputs(*pair) for pair in zip(requests, inputs, strict=True)]
        for group in [requests] if together else [[request] for request in requests]:
            self._run(group)
        del held  # the device reads the arrays until here
        return [
            {
                name: request.get_output_tensor(index).data
                for index, names in self._outputs
                for name in names
            }
            for request in requests
        ]

    def _run(self, requests: Sequence[ov.InferRequest]) -> None:
        started: list[ov.InferRequest] = []
        try:
            for request in requests:
                request.start_async()
                started.append(request)
            for request in requests:
                while not request.wait_for(_WAIT_MS):
                    pass
        except BaseException as error:  # the device's, or Ctrl-C between two looks
            for request in started:
                request.cancel()
            for request in started:
                _wait_out(request)
            if isinstance(error, RuntimeError):
                raise self._failed(error) from error
            raise

    def _request(self, compiled: ov.CompiledModel, number: int) -> ov.InferRequest:
        """Return this thread's request ``number`` of ``compiled``."""
        of, requests = getattr(self._requests, "mine", (None, []))
        if of is not compiled:
            requests = []
            self._requests.mine = (compiled, requests)
        while len(requests) <= number:
            requests.append(compiled.create_infer_request())
        request: ov.InferRequest = requests[number]
        return request

    def _set_inputs(self, request: ov.InferRequest, inputs: Mapping[str, Array]) -> list[Array]:
        held: list[Array] = []
        seen: set[int] = set()
        for name, value in inputs.items():
            index = self._inputs.get(name)
            if index is None:
                known = ", ".join(key for key, _ in self._input_ports)
                raise ModelFolderError(
                    f"The graph of the {self.name} has no input {name!r}; it takes: {known}."
                )
            if isinstance(value, DeviceArray) and self._hardware == (value.device,):
                request.set_tensor(self._input_ports[index][0], value.tensor)
                seen.add(index)
                continue
            array = np.ascontiguousarray(value, self._input_ports[index][1])
            if array.ndim != np.ndim(value):  # ascontiguousarray makes a scalar a vector
                array = array.reshape(np.shape(value))
            try:
                request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
            except RuntimeError as error:
                raise ModelFolderError(
                    f"The graph of the {self.name} does not take {name} of the shape"
                    f" {list(array.shape)} ({short_reason(error)})."
                ) from error
            held.append(array)
            seen.add(index)
        for index, (key, _) in enumerate(self._input_ports):
            if index not in seen:
                raise ModelFolderError(
                    f"The graph of the {self.name} has an input {key!r}, which nothing gives; get"
                    " the model again."
                )
        return held

    def _failed(self, error: RuntimeError) -> SdvinoError:
        reason = short_reason(error)
        if "alloc" in reason.lower():
            return SdvinoError(
                f"There was not enough memory to run the {self.name};"
                " try a smaller picture, or close other programs."
            )
        return SdvinoError(f"The {self.name} failed on {self.settings.device} ({reason}).")

    def _set_compiled(self, compiled: ov.CompiledModel) -> None:
        self._inputs = {
            name: index
            for index, port in enumerate(compiled.inputs)
            for name in (*port.get_names(), port.get_node().get_friendly_name())
        }
        self._input_ports = [
            (
                min(port.get_names(), key=_readable, default=f"#{index}"),
                port.get_element_type().to_dtype(),
            )
            for index, port in enumerate(compiled.inputs)
        ]
        self._outputs = [
            (index, tuple(port.get_names()) or (f"#{index}",))
            for index, port in enumerate(compiled.outputs)
        ]
        self._compiled = compiled

    def _compile(self) -> ov.CompiledModel:
        core = shared_core() if self._core is None else self._core
        available = core.available_devices
        device = normalize_device(self.settings.device, available)
        facts = {name: device_facts(core, name) for name in hardware_of(device, available)}
        xml = read_xml(self.xml_path, self.name)
        properties = compile_properties(
            self.settings, device, facts, self.name, eight_bits=quantizes_activations(xml)
        )
        self._hardware = tuple(facts)
        self._precision = precision_in(properties)

        rewrite = rewrite_for(self.name, self.settings, self._precision, facts)

        @functools.cache
        def read() -> ov.Model:
            model = self._read(core)
            rewrite(model)
            return model

        weights = self.xml_path.with_suffix(".bin")
        compiler = Compiler(
            core=core,
            read=read,
            weights=weights,
            device=device,
            properties=properties,
            facts=facts,
        )
        root = None
        if self.settings.cache:
            folder = self.settings.cache_dir
            root = default_cache_dir() if folder is None else folder
        try:
            if root is None:
                self._digests(xml, None)
                return compiler.by_openvino(None)
            known = root / "digests"
            digests = self._digests(xml, known)
            cache = CompiledCache(root, self.settings.cache_limit_bytes)
            changes: list[Change] = [rewrite] if self._prepare is None else [self._prepare, rewrite]
            key = key_of_files(digests, changes, device, properties, facts, known)
            if key is not None:
                return cache.compile(key, compiler.by_key)
            key = graph_key(read(), digests, device, properties)
            return cache.compile(key, compiler.by_openvino)
        except RuntimeError as error:
            raise DeviceError(
                f"{device} cannot run the {self.name} ({short_reason(error)});"
                " try --device CPU, or other settings."
            ) from error

    def _digests(self, xml: bytes, known: Path | None) -> list[str]:
        """Return the SHA-256 of the graph's text and of its weights, as they are now.

        They are what a compiled model is known by. Raises ModelFolderError where they should be
        others. ``known`` keeps them between runs; see `sdvino.inputs.digests`.
        """
        weights = self.xml_path.with_suffix(".bin")
        if known is None and not self._sha256:
            return []
        found = [hashlib.sha256(xml).hexdigest(), digest_of(weights, known)]
        for path, digest in zip((self.xml_path, weights), found, strict=True):
            if self._sha256.get(path.name, digest) != digest:
                raise wrong_file(f"{self.name}/{path.name}")
        return found

    def _read(self, core: ov.Core) -> ov.Model:
        if self._graph is not None:
            return self._graph
        try:
            model = core.read_model(self.xml_path, self.xml_path.with_suffix(".bin"))
            if self._prepare is not None:
                self._prepare(model)
            check_folding(model, self.name)
        except RuntimeError as error:
            raise ModelFolderError(
                f"The graph of the {self.name} cannot be read ({short_reason(error)});"
                " get the model again, or update OpenVINO."
            ) from error
        if self._keep_graph:
            self._graph = model
        return model


def _readable(name: str) -> tuple[bool, int, str]:
    """Order a tensor's names: exporters' words before their numbers."""
    return name.isdigit(), len(name), name


def _wait_out(request: ov.InferRequest) -> None:
    try:
        request.wait()
    except RuntimeError:
        return  # that is how a cancelled run ends
