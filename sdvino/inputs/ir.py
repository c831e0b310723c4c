"""A first look at an OpenVINO IR, before OpenVINO itself reads it.

OpenVINO's own errors are pages of C++; here a folder with missing or truncated files gets one
sentence, and the shapes that the graph declares can be held against the configurations. Only the
ends of the XML's meaning are read (well-formedness, inputs, where weights lie), in milliseconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from sdvino.errors import ModelFolderError
from sdvino.inputs.files import open_file, read_bytes

#: The UNet of Stable Diffusion XL, quantized, has an XML of about 15 MB.
MAX_XML_BYTES = 128 * 2**20

#: In XML that `_check_xml` took, every `<` begins a tag: these are all that there are.
_TAG = re.compile(rb"<(layer|data)(?=[\s/>])([^<]*)")
_ATTRIBUTE = re.compile(rb"""\s*([\w:.-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
#: A constant as OpenVINO writes it, which most tags are: the short way.
_CONSTANT = re.compile(
    rb'\s+element_type="(\w+)" shape="([\d, ]*)" offset="(\d{1,18})" size="(\d{1,18})"\s*/>\s*'
)
_CONSTANT_KEYS = (b"element_type", b"shape", b"offset", b"size")
#: A tag without one of these (or an escaped character) says nothing that is wanted here.
_WANTED = re.compile(rb"Parameter|FakeQuantize|offset|_type|shape|&")
_NAMES = re.compile(rb"""\bnames\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_PLACE = re.compile(rb"\d{1,18}")
_QUANTIZED = re.compile(rb'\btype\s*=\s*["\']FakeQuantize["\']')
#: A Parameter's layer is a few hundred bytes long.
_LAYER_BYTES = 65_536
_MOST_INPUTS = 1_000
#: Weights that no graph names are not written by OpenVINO, but are no harm either.
_MORE_BYTES = 64 * 2**20
#: Element types of weights and inputs. Some others take OpenVINO down when a graph has them.
_ELEMENT_TYPES = frozenset(
    b"boolean f16 f32 f64 bf16 i4 i8 i16 i32 i64 u4 u8 u16 u32 u64 f8e4m3 f8e5m2".split()
)
_TYPED = (b"element_type", b"destination_type")


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


def summarize_ir(xml: Path, weights: Path, what: str) -> IrSummary:
    """Look through the IR ``xml`` with its ``weights``; ``what`` names it in messages.

    Raises ModelFolderError when the XML is not an IR, is damaged, declares a document type (the way
    to entity bombs), or when the weights are missing or shorter than the XML says.
    """
    raw = read_xml(xml, what)
    _check_xml(raw, what)
    summary = _summarize(raw, what)
    with open_file(weights, f"{what}/{weights.name}") as file:
        size = os.fstat(file.fileno()).st_size
    if size < summary.weights_end:
        raise ModelFolderError(
            f"{what}/{weights.name} is truncated: it has {size:,} of {summary.weights_end:,} bytes;"
            " get the model again."
        )
    if size > 2 * summary.weights_end + _MORE_BYTES:
        raise ModelFolderError(
            f"{what}/{weights.name} has {size:,} bytes and its graph names {summary.weights_end:,};"
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
    return read_bytes(xml, f"{what}/{xml.name}", limit=MAX_XML_BYTES)


class _NotAnIr(Exception):
    """Raised inside the parser, to stop it."""


def _check_xml(raw: bytes, what: str) -> None:
    """Check that ``raw`` is well-formed, an IR, and has in it what an IR has: elements alone.

    Comments, CDATA and processing instructions, which OpenVINO never writes, could hide from a look
    at tags what OpenVINO reads, or show it what OpenVINO does not.
    """
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise _NotAnIr

    def declaration(_: str, encoding: str | None, __: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise _NotAnIr

    def root(name: str, _: object) -> None:
        if name != "net":
            raise _NotAnIr
        parser.StartElementHandler = None  # the rest is parsed at the speed of C

    parser.StartDoctypeDeclHandler = refuse
    parser.CommentHandler = refuse
    parser.StartCdataSectionHandler = refuse
    parser.ProcessingInstructionHandler = refuse
    parser.XmlDeclHandler = declaration
    parser.StartElementHandler = root
    try:
        if b"\0" in raw[:64]:  # UTF-16
            raise _NotAnIr
        parser.Parse(raw, True)
    except _NotAnIr as error:
        raise ModelFolderError(
            f"{what}/openvino_model.xml is not an OpenVINO model; get the model again."
        ) from error
    except (expat.ExpatError, UnicodeError, ValueError) as error:
        raise _damaged(what, str(error)) from error


def _summarize(raw: bytes, what: str) -> IrSummary:
    end = 0
    weights: dict[tuple[str, bool], int] = {}
    inputs: dict[str, tuple[int | None, ...]] = {}
    groups: list[frozenset[str]] = []
    quantized = False
    names: list[str] | None = None  # of the input whose shape is yet to come
    for match in _TAG.finditer(raw):
        told = _attributes(match[2])
        if match[1] == b"layer":
            names = None
            kind = told.get(b"type")
            quantized = quantized or kind == b"FakeQuantize"
            if kind == b"Parameter":
                names = _tensor_names(raw, match.start(), told)
                groups.append(frozenset(names))
                if len(groups) > _MOST_INPUTS:
                    raise _damaged(what, f"it has over {_MOST_INPUTS} inputs")
            continue
        for key in _TYPED:
            element = told.get(key, b"f32")
            if element not in _ELEMENT_TYPES:
                shown = element[:40].decode("utf-8", "replace")
                raise _damaged(what, f"it has numbers of the type {shown!r}")
        if b"offset" in told and b"size" in told:
            places = [told[b"offset"], told[b"size"]]
            if any(_PLACE.fullmatch(place) is None for place in places):
                raise _damaged(what, "it says nonsense about where weights are")
            size = int(places[1])
            end = max(end, int(places[0]) + size)
            kind_of = _constant_kind(told)
            weights[kind_of] = weights.get(kind_of, 0) + size
        if names is not None and b"shape" in told:
            inputs |= dict.fromkeys(names, _dimensions(told[b"shape"]))
            names = None
    if not groups:
        raise ModelFolderError(f"{what}/openvino_model.xml has no input; get the model again.")
    return IrSummary(
        inputs=inputs,
        input_names=tuple(groups),
        weights_end=end,
        weights=weights,
        quantized=quantized,
    )


def _attributes(tag: bytes) -> dict[bytes, bytes]:
    """Return the attributes of a tag, of which ``tag`` is what follows its name.

    None of them where none can matter.
    """
    constant = _CONSTANT.fullmatch(tag)
    if constant is not None:
        return dict(zip(_CONSTANT_KEYS, constant.groups(), strict=True))
    if _WANTED.search(tag) is None:
        return {}
    found: dict[bytes, bytes] = {}
    place = 0
    while (match := _ATTRIBUTE.match(tag, place)) is not None:
        value = match[2] or match[3] or b""
        found[match[1]] = _unescaped(value) if b"&" in value else value
        place = match.end()
    return found


def _unescaped(value: bytes) -> bytes:
    import html  # its tables of names take longer to load than any IR needs them

    return html.unescape(value.decode("utf-8", "replace")).encode("utf-8", "replace")


def _constant_kind(told: Mapping[bytes, bytes]) -> tuple[str, bool]:
    """Return a constant's element type, and whether it has four dimensions or more."""
    name = told.get(b"element_type", b"").decode("ascii", "replace")
    return name, told.get(b"shape", b"").count(b",") >= 3


def _tensor_names(raw: bytes, start: int, told: Mapping[bytes, bytes]) -> list[str]:
    """Return the names of the input whose layer begins at ``start``: its port's, or its own."""
    end = raw.find(b"</layer>", start, start + _LAYER_BYTES)
    names = None if end < 0 else _NAMES.search(raw, start, end)
    if names is not None:
        value = names[1] if names[2] is None else names[2]
        return _unescaped(value).decode("utf-8", "replace").split(",")
    own = told.get(b"name")
    return [] if own is None else [own.decode("utf-8", "replace")]


def _dimensions(text: bytes) -> tuple[int | None, ...]:
    words = [word.strip() for word in text.split(b",")] if text.strip() else []
    return tuple(int(word) if word.isdigit() and len(word) < 19 else None for word in words)


def _damaged(what: str, why: str) -> ModelFolderError:
    return ModelFolderError(
        f"{what}/openvino_model.xml is damaged or cut off ({why}); get the model again."
    )
