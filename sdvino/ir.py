"""A first look at an OpenVINO IR, before OpenVINO itself reads it.

OpenVINO's own errors are pages of C++; here a folder with missing or truncated files gets one
sentence, and the shapes that the graph declares can be held against the configurations. Only the
ends of the XML's meaning are read (well-formedness, inputs, where weights lie), in milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from sdvino.errors import ModelFolderError

#: The UNet of Stable Diffusion XL, quantized, has an XML of about 15 MB.
MAX_XML_BYTES = 128 * 2**20

_DATA = re.compile(rb"<data\b[^>]*>")
_OFFSET = re.compile(rb'\boffset\s*=\s*["\'](\d{1,18})["\']')
_SIZE = re.compile(rb'\bsize\s*=\s*["\'](\d{1,18})["\']')
_SHAPE = re.compile(rb'\bshape\s*=\s*["\']([^"\']*)["\']')
_ELEMENT = re.compile(rb'\belement_type\s*=\s*["\'](\w{1,16})["\']')
_QUANTIZED = re.compile(rb'\btype\s*=\s*["\']FakeQuantize["\']')
_NAMES = re.compile(rb'\bnames\s*=\s*["\']([^"\']*)["\']')
_NAME = re.compile(rb'\bname\s*=\s*["\']([^"\']*)["\']')
_INPUT = re.compile(rb'<layer\b[^>]*\btype\s*=\s*["\']Parameter["\'][^>]*>')


@dataclass(frozen=True, slots=True)
class IrSummary:
    """What the XML of an IR says of itself."""

    #: Tensor name to declared shape; None is a dimension left open. Every name of an input is here.
    inputs: dict[str, tuple[int | None, ...]]
    #: The same inputs, one group of names each.
    input_names: tuple[frozenset[str], ...]
    #: The weights end at this byte of the .bin.
    weights_end: int
    #: Bytes of constants by element type (f16, i8 ...), and whether they are of convolutions: of
    #: four dimensions or more.
    weights: dict[tuple[str, bool], int]
    #: Whether activations are quantized anywhere.
    quantized: bool


def read_ir(xml: Path, weights: Path, what: str) -> IrSummary:
    """Look through the IR ``xml`` with its ``weights``; ``what`` names it in messages.

    Raises ModelFolderError when the XML is not an IR, is damaged, declares a document type (the way
    to entity bombs), or when the weights are missing or shorter than the XML says.
    """
    raw = read_xml(xml, what)
    _check_xml(raw, what)
    summary = _summarize(raw, what)
    try:
        size = weights.stat().st_size
    except FileNotFoundError as error:
        raise ModelFolderError(f"{what}/{weights.name} is missing; get the model again.") from error
    if size < summary.weights_end:
        raise ModelFolderError(
            f"{what}/{weights.name} is truncated: it has {size:,} of {summary.weights_end:,} bytes;"
            " get the model again."
        )
    return summary


def quantizes_activations(raw: bytes) -> bool:
    """Return whether the IR whose XML is ``raw`` has activations in 8 bits, or in fewer."""
    return _QUANTIZED.search(raw) is not None


def read_xml(xml: Path, what: str) -> bytes:
    """Return the text of an IR's XML, within the size that any has; ``what`` names it in messages.

    Raises ModelFolderError.
    """
    try:
        with xml.open("rb") as file:
            raw = file.read(MAX_XML_BYTES + 1)
    except FileNotFoundError as error:
        raise ModelFolderError(f"{what}/{xml.name} is missing; get the model again.") from error
    except OSError as error:
        raise ModelFolderError(f"{what}/{xml.name} cannot be read ({error.strerror}).") from error
    if len(raw) > MAX_XML_BYTES:
        raise ModelFolderError(f"{what}/{xml.name} is over 128 MB, which no such file is.")
    return raw


class _NotAnIr(Exception):
    """Raised inside the parser, to stop it."""


def _check_xml(raw: bytes, what: str) -> None:
    parser = expat.ParserCreate()

    def doctype(*_: object) -> None:
        raise _NotAnIr

    def root(name: str, _: object) -> None:
        if name != "net":
            raise _NotAnIr
        parser.StartElementHandler = None  # the rest is parsed at the speed of C

    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = root
    try:
        parser.Parse(raw, True)
    except _NotAnIr as error:
        raise ModelFolderError(
            f"{what}/openvino_model.xml is not an OpenVINO model; get the model again."
        ) from error
    except (expat.ExpatError, UnicodeError, ValueError) as error:
        raise ModelFolderError(
            f"{what}/openvino_model.xml is damaged or cut off ({error}); get the model again."
        ) from error


def _summarize(raw: bytes, what: str) -> IrSummary:
    end = 0
    weights: dict[tuple[str, bool], int] = {}
    for match in _DATA.finditer(raw):
        tag = match.group()
        offset = _OFFSET.search(tag)
        size = _SIZE.search(tag)
        if offset is not None and size is not None:
            end = max(end, int(offset.group(1)) + int(size.group(1)))
            kind = _constant_kind(tag)
            weights[kind] = weights.get(kind, 0) + int(size.group(1))
    inputs: dict[str, tuple[int | None, ...]] = {}
    groups: list[frozenset[str]] = []
    for match in _INPUT.finditer(raw):
        layer = raw[match.start() : raw.find(b"</layer>", match.start())]
        names = _tensor_names(layer)
        shape = _SHAPE.search(layer)
        groups.append(frozenset(names))
        if shape is not None:
            inputs |= dict.fromkeys(names, _dimensions(shape.group(1)))
    if not groups:
        raise ModelFolderError(f"{what}/openvino_model.xml has no input; get the model again.")
    return IrSummary(
        inputs=inputs,
        input_names=tuple(groups),
        weights_end=end,
        weights=weights,
        quantized=quantizes_activations(raw),
    )


def _constant_kind(tag: bytes) -> tuple[str, bool]:
    """Return a constant's element type, and whether it has four dimensions or more."""
    element, shape = _ELEMENT.search(tag), _SHAPE.search(tag)
    name = "" if element is None else element.group(1).decode("ascii")
    return name, shape is not None and shape.group(1).count(b",") >= 3


def _tensor_names(layer: bytes) -> list[str]:
    names = _NAMES.search(layer)
    if names is not None:
        return names.group(1).decode("utf-8", "replace").split(",")
    own = _NAME.search(layer)
    return [] if own is None else [own.group(1).decode("utf-8", "replace")]


def _dimensions(text: bytes) -> tuple[int | None, ...]:
    words = [word.strip() for word in text.split(b",")] if text.strip() else []
    return tuple(int(word) if word.isdigit() and len(word) < 19 else None for word in words)
