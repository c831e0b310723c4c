"""A graph's files become a compiled model: read, edited and compiled, or as the cache keeps it.

An `sdvino.graph.edit.Edit` has the fastest second start: what it made is known by the files, the
edit and the code that makes it, so the graph is neither read nor edited again, and OpenVINO imports
the blob. Any other function is run again, and OpenVINO looks for its blob by a hash of the edited
graph, all its weights included.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
from numpy import frombuffer, uint8

from sdvino.graph.edit import Edit
from sdvino.graph.prepare import prepare_for_hardware
from sdvino.inputs.digests import digest_of
from sdvino.runtime.cache import cache_key
from sdvino.runtime.mapped import pages_dropped
from sdvino.runtime.properties import (
    DeviceFacts,
    convolves_linears,
    cpus_alone,
    norms_by_channel,
)
from sdvino.settings import DeviceSettings

_log = logging.getLogger("sdvino")
#: Changes a graph in place before it is compiled: an `Edit`, or what is not known again.
Change = Callable[[ov.Model], object]
#: Devices that take blobs without weights.
_WEIGHTLESS = ("CPU", "GPU", "AUTO", "HETERO")
#: The line before a model in OpenVINO's cache is not longer, and says how the model is padded.
_HEADER_BYTES = 4096
_PADDED = re.compile(rb'header_size_alignment="[^0"]')
#: A blob without weights has some 10 MB.
_COPIED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """Makes the compiled model of one graph, in the ways that `CompiledCache.compile` asks for."""

    core: ov.Core
    #: Gives the edited graph.
    read: Callable[[], ov.Model]
    weights: Path
    device: str
    properties: Mapping[str, Any]
    #: Of the hardware that may run it, by device.
    facts: Mapping[str, DeviceFacts]

    def by_openvino(self, cache_dir: Path | None) -> ov.CompiledModel:
        """Read and compile the graph, with ``cache_dir`` as OpenVINO's cache unless it is None."""
        kept = {} if cache_dir is None else {"CACHE_DIR": str(cache_dir), **self._without_weights}
        with self._pages_dropped(cache_dir):  # reading edits the graph, which may look at weights
            model = self.read()
            return self.core.compile_model(model, self.device, {**self.properties, **kept})

    def by_key(self, entry: Path | None) -> ov.CompiledModel:
        """Import what ``entry`` has; where it has nothing, compile the graph and put it there.

        None: compile and keep nothing. OpenVINO itself writes the blob (`export_model` would make
        four copies in memory first), and reads it where this cannot.
        """
        blob = None if entry is None else next(entry.glob("*.blob"), None)
        content: Any = None if blob is None else _mapped(blob)
        if content is not None:
            properties = {**self.properties, **self._without_weights}
            try:
                with self._pages_dropped(entry):
                    imported = self.core.import_model(content, self.device, properties)
                # It goes on reading what it was imported from, which is to live as long.
                return ov.CompiledModel(imported, content)
            except RuntimeError as error:
                _log.debug("A compiled model could not be imported: %s", error)
        return self.by_openvino(entry)

    @property
    def _without_weights(self) -> dict[str, str]:
        """Properties for blobs without weights, where the device is known to make them.

        Their size is a hundredth, and on a CPU they load as fast as whole ones. OpenVINO finds the
        weights of an edited graph again only when told where they are.
        """
        if self.device.partition(".")[0].partition(":")[0] not in _WEIGHTLESS:
            return {}
        return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(self.weights)}

    def _pages_dropped(self, cache_dir: Path | None) -> Any:
        # Other devices may read what is mapped where it lies, each time.
        mapped = [self.weights] if cache_dir is None else [self.weights, cache_dir]
        return pages_dropped(mapped if tuple(self.facts) == ("CPU",) else [])


def rewrite_for(
    component: str,
    settings: DeviceSettings,
    precision: str | None,
    facts: Mapping[str, DeviceFacts],
) -> Edit:
    """Return what makes of a graph the one that runs fastest where ``facts`` are of; exact.

    ``component`` is what the graph is of, ``precision`` what its floats are computed in.
    """
    return Edit.of(
        prepare_for_hardware,
        convolutions=convolves_linears(settings, facts),
        biases=cpus_alone(facts),
        channels=norms_by_channel(component, precision, facts),
    )


def key_of_files(
    files: Sequence[str],
    changes: Sequence[Change],
    device: str,
    properties: Mapping[str, Any],
    facts: Mapping[str, DeviceFacts],
    known: Path | None = None,
) -> str | None:
    """Return a key for what ``changes`` make of these files on the device CPU, the graph unread.

    ``files`` are the SHA-256 of graph and weights; ``known`` keeps those of files that an edit
    reads between runs (see `sdvino.inputs.digests`). None where a change is no `Edit`, and for
    other devices, AUTO and HETERO among them.
    """
    edits = [change for change in changes if isinstance(change, Edit)]
    if len(edits) < len(changes) or device != "CPU":
        return None
    return cache_key(
        ov.get_version(),
        list(files),
        [edit.key(lambda path: digest_of(path, known)) for edit in edits],
        sorted(properties.items()),
        [_kind_of(entry) for entry in facts.values()],
    )


def _kind_of(facts: DeviceFacts) -> object:
    """Return what of a CPU decides on the kernels that OpenVINO chooses for it."""
    cpu = facts.cpu
    known = None if cpu is None else (cpu.vendor, sorted(cpu.flags), cpu.limited)
    return sorted(facts.capabilities), facts.amx, known


def _mapped(blob: Path) -> ov.Tensor | None:
    """Return the compiled model in a file of OpenVINO's cache.

    A large one is read where it lies, when it is: should somebody cut that file meanwhile, the
    system ends the process. One without weights is small enough to be copied. None where the file
    is not as OpenVINO 2026.4 writes it for a CPU: a line of XML about the compiled model
    (`CompiledBlobHeader` in its src/inference/src), then the model.
    """
    with blob.open("rb") as file:
        header = file.readline(_HEADER_BYTES)
        if not header.startswith(b"<?xml") or not header.endswith(b"\n") or _PADDED.search(header):
            return None
        if os.fstat(file.fileno()).st_size <= _COPIED_BYTES:
            return ov.Tensor(frombuffer(bytearray(file.read()), uint8), shared_memory=True)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = len(mapped) - len(header)
    # OpenVINO shares writable arrays alone, so this view says it is one; nobody writes.
    address = frombuffer(mapped, uint8).ctypes.data + len(header)
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    memory.owner = mapped
    return ov.Tensor(frombuffer(memory, uint8), shared_memory=True)
