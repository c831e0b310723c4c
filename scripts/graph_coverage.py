"""How much of a component's arithmetic is planned in 8 bits, and how much runs in 8 bits.

The plan is read from the IR: a product whose activations come from a FakeQuantize and whose weights
are stored in 8 bits. What runs is read from the model that OpenVINO compiled, from the types that
its kernels take. Both are counted in multiply-adds, at the shapes that the runtime gives the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import openvino as ov

from sdvino.compress.fragile import fragile_nodes
from sdvino.compress.layers import (
    CONVOLUTIONS,
    attention_nodes,
    nodes_with_weights,
    residual_sources,
)
from sdvino.folder.index import ModelFolder
from sdvino.graph.walk import is_constant, reshape_static
from sdvino.runtime.compiling import rewrite_for
from sdvino.runtime.components import unet_shapes
from sdvino.runtime.core import device_facts, shared_core
from sdvino.runtime.properties import compile_properties, precision_in
from sdvino.settings import DeviceSettings

#: The share of multiply-adds, outside attention and the named exceptions, that must run in 8 bits.
REQUIRED: Mapping[str, float] = {"unet": 0.95, "vae_decoder": 0.90}

_EIGHT_BITS = ("i8", "u8")
_PRODUCTS = (*CONVOLUTIONS, "MatMul", "ScaledDotProductAttention")
#: Operations that hand values on: NNCF quantizes before them what a product reads behind them.
_PASSING = frozenset(
    {
        "Concat",
        "Convert",
        "Interpolate",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StridedSlice",
        "Transpose",
        "Unsqueeze",
        "VariadicSplit",
    }
)
#: What OpenVINO's CPU plugin calls the kernels that multiply.
_KERNELS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A product of the graph. Multiply-adds are for one evaluation."""

    name: str
    multiply_adds: int
    #: Why it is no part of what is required: "attention", "fragile", "residual"; or "".
    exception: str
    #: Whether the IR has activations and weights in 8 bits.
    planned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Multiply-adds of one component: what was planned, what runs."""

    component: str
    layers: tuple[Layer, ...]
    #: Names of the layers that run in 8 bits.
    running: frozenset[str]
    #: Kernels that multiply and belong to no layer of the graph, by their own names.
    unknown: tuple[str, ...] = field(default=())

    def sum(self, *exceptions: str, planned: bool = False, running: bool = False) -> int:
        """Return the multiply-adds of layers with these exceptions ("" for none of them)."""
        return sum(
            layer.multiply_adds
            for layer in self.layers
            if layer.exception in exceptions
            and (layer.planned or not planned)
            and (layer.name in self.running or not running)
        )

    @property
    def planned_share(self) -> float:
        """The share of what is required that the IR plans in 8 bits."""
        return self._share(self.sum("", planned=True))

    @property
    def running_share(self) -> float:
        """The share of what is required that runs in 8 bits."""
        return self._share(self.sum("", running=True))

    @property
    def required(self) -> float | None:
        """The share that must run in 8 bits; None where nothing is asked for."""
        return REQUIRED.get(self.component)

    @property
    def enough(self) -> bool:
        """Whether as much runs in 8 bits as is required, and every kernel is accounted for."""
        return self.required is None or (self.running_share >= self.required and not self.unknown)

    @property
    def left_in_float(self) -> tuple[Layer, ...]:
        """The layers without an exception that do not run in 8 bits, the largest first."""
        left = [x for x in self.layers if not x.exception and x.name not in self.running]
        return tuple(sorted(left, key=lambda layer: -layer.multiply_adds))

    def _share(self, part: int) -> float:
        whole = self.sum("")
        return part / whole if whole else math.nan


def measure(component: str, model: ov.Model, compiled: ov.CompiledModel | None = None) -> Coverage:
    """Return the coverage of ``model``, whose shapes are static.

    Unless ``compiled`` is given, rewrites it in place and compiles it for the CPU, as sdvino's
    runtime does.
    """
    layers = planned_layers(component, model)
    if compiled is None:
        core = shared_core()
        facts = {"CPU": device_facts(core, "CPU")}
        settings = DeviceSettings()
        properties = compile_properties(settings, "CPU", facts)
        rewrite_for(component, settings, precision_in(properties), facts)(model)
        compiled = core.compile_model(model, "CPU", properties)
    running, unknown = running_layers(compiled.get_runtime_model(), layers)
    return Coverage(
        component=component, layers=tuple(layers), running=frozenset(running), unknown=unknown
    )


def planned_layers(component: str, model: ov.Model) -> list[Layer]:
    """Return the products of ``model``, in graph order, and what the IR plans for them."""
    weighted = nodes_with_weights(model)
    exceptions = dict.fromkeys(attention_nodes(model), "attention")
    exceptions |= dict.fromkeys(residual_sources(model), "residual")
    exceptions |= dict.fromkeys(fragile_nodes(component, weighted), "fragile")
    return [
        Layer(
            name=op.get_friendly_name(),
            multiply_adds=multiply_adds(op),
            exception=exceptions.get(op.get_friendly_name(), ""),
            planned=all(_in_eight_bits(op.input_value(port)) for port in (0, 1)),
        )
        for op in model.get_ordered_ops()
        if op.get_type_name() in _PRODUCTS
    ]


def multiply_adds(op: ov.Node) -> int:
    """Return the multiply-adds of a product with static shapes."""
    first, second = (list(op.input(port).get_shape()) for port in (0, 1))
    out = math.prod(op.output(0).get_shape())
    kind = op.get_type_name()
    if kind == "Convolution":  # weights [O, I, ...]
        return int(out * math.prod(second[1:]))
    if kind == "GroupConvolution":  # weights [G, O, I, ...]
        return int(out * math.prod(second[2:]))
    if kind == "ConvolutionBackpropData":  # weights [I, O, ...]: every input meets every weight
        return int(math.prod(first) * math.prod(second[1:]))
    if kind == "MatMul":
        return int(out * first[-2 if op.get_attributes()["transpose_a"] else -1])
    # Scaled dot product attention: queries by keys, then weights by values.
    return int(math.prod(first[:-1]) * second[-2] * (first[-1] + list(op.input(2).get_shape())[-1]))


def running_layers(runtime: ov.Model, layers: Sequence[Layer]) -> tuple[set[str], tuple[str, ...]]:
    """Return which of ``layers`` run in 8 bits in ``runtime``, OpenVINO's model of what runs.

    The second is kernels that multiply and belong to none of the layers: they should be none.
    """
    known = _by_name(layers)
    kernels = [op for op in runtime.get_ordered_ops() if _rt(op, "layerType") in _KERNELS]
    named = [(op, _originals(_rt(op, "originalLayersNames"), known)) for op in kernels]
    claimed = {name for _, names in named for name in names}
    left = [x for x in layers if x.name not in claimed and x.exception != "attention"]
    running: set[str] = set()
    unknown: list[str] = []
    for op, names in named:
        if not names:
            # Passes of OpenVINO can lose a name; its size and place tell whose kernel it is.
            size = _kernel_multiply_adds(op)
            layer = next((layer for layer in left if layer.multiply_adds == size), None)
            if layer is not None:
                left.remove(layer)
                names = {layer.name}
            elif _rt(op, "layerType") != "MatMul":  # attention, taken apart, has names of its own
                unknown.append(op.get_friendly_name())
        ports = (op.input(port) for port in (0, 1))
        if all(port.get_element_type().get_type_name() in _EIGHT_BITS for port in ports):
            running |= names
    return running, tuple(unknown)


def _kernel_multiply_adds(op: ov.Node) -> int:
    first, second = (list(op.input(port).get_shape()) for port in (0, 1))
    out = list(op.output(0).get_shape())
    kind = _rt(op, "layerType")
    if kind == "Convolution":  # weights [O, I, ...] or [G, O, I, ...]
        return int(math.prod(out) * math.prod(second[1 + len(second) - len(out) :]))
    if kind == "Deconvolution":
        return int(math.prod(first) * math.prod(second[1:]))
    return int(math.prod(out) * first[-1])


def fix_shapes(
    folder: ModelFolder, component: str, model: ov.Model, height: int, width: int
) -> None:
    """Give the inputs of a component static shapes, in place, for one picture.

    ``model`` is the IR of ``component`` in ``folder``, a UNet or a part of an autoencoder;
    ``height`` and ``width`` are those of the picture's latents.
    """
    if component == "unet":
        shapes = unet_shapes(folder, height, width)
    elif component == "vae_encoder":
        scale = folder.vae_scale_factor
        shapes = {"sample": [1, 3, height * scale, width * scale]}
    else:
        shapes = {"latent_sample": [1, folder.latent_channels, height, width]}
    reshape_static(model, shapes)


def _in_eight_bits(value: ov.Output) -> bool:
    """Tell whether ``value`` comes from a FakeQuantize, or from a constant in 8 bits."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "FakeQuantize":
        return bool(int(node.get_attributes()["levels"]) <= 256)
    if kind == "Constant":
        return node.get_element_type().get_type_name() in _EIGHT_BITS
    if kind in ("Multiply", "Subtract") and is_constant(value):
        return _in_eight_bits(node.input_value(0))
    if kind == "Concat":
        return all(_in_eight_bits(source) for source in node.input_values())
    return kind in _PASSING and _in_eight_bits(node.input_value(0))


def _originals(text: str, known: Mapping[str, str]) -> set[str]:
    """Return the layers that a kernel's list of original operations stands for.

    Passes of OpenVINO add to names (NAME/DequantizationMultiply), and a linear with its bias is
    called after the addition: ``known`` has layers by their own names and by what they lie in.
    """
    found: set[str] = set()
    for name in text.split(","):
        while name and name not in known:
            name = name.rpartition("/")[0]
        if name:
            found.add(known[name])
    return found


def _by_name(layers: Sequence[Layer]) -> dict[str, str]:
    """Return the layers' names by themselves, and by the part before the last slash if unique."""
    names = [layer.name for layer in layers]
    parents = [name.rpartition("/")[0] for name in names]
    known = {
        parent: name
        for parent, name in zip(parents, names, strict=True)
        if parent and parents.count(parent) == 1
    }
    return known | {name: name for name in names}


def _rt(op: ov.Node, key: str) -> str:
    """Return what the compiled model says of a kernel under ``key``."""
    info = op.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
