"""The layers that the networks are written in: products with weights, norms, attention.

A graph is built over the checkpoint's own numbers: every weight is a constant in the file's own
type, mapped and not copied, and a Convert. Each layer carries its name in diffusers, so that a
recipe, a report and a LoRA speak of it by the name that people know.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sdvino.errors import RequestError
from sdvino.nets.structure import Structure, within, wrong
from sdvino.weights.safetensors import Tensors

#: A value in the graph. Pictures are [N, C, H, W], tokens [N, T, C].
Value: TypeAlias = ov.Node

#: safetensors' type -> OpenVINO's, for constants.
_TYPES: Mapping[str, ov.Type] = {
    "F64": ov.Type.f64,
    "F32": ov.Type.f32,
    "F16": ov.Type.f16,
    "BF16": ov.Type.bf16,
    "F8_E4M3": ov.Type.f8e4m3,
    "F8_E5M2": ov.Type.f8e5m2,
}
_AFFINE = ("weight", "bias")
# What older libraries saved with the weights: a table of 0, 1, 2 ...
_IGNORED = ("position_ids",)
# What OpenVINO calls the constants of a layer with a name: NAME/Constant_117.
_NUMBERED = re.compile(r"(.+/[A-Za-z]+)_\d+")
# 2^-24 is float32's own precision at 1; as two factors, each is exact in float16 too.
_FIXED_POINT_BITS = 24


class UnknownNetwork(Exception):
    """Raised for a config that asks for what is not written here: another exporter may know it."""


class Layers:
    """The layers of one component, by name. Each reads its weights from ``tensors``.

    Raises RequestError for a weight that is missing, is no float or has another shape than the
    config says.
    """

    def __init__(self, tensors: Tensors, structure: Structure | None = None) -> None:
        """``structure`` says what a pass made different from the config; None: nothing."""
        self._tensors = tensors
        self._structure = Structure() if structure is None else structure
        self._used: set[str] = set()
        self._applied: set[str] = set()

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor called ``name``."""
        return name in self._tensors

    def removed(self, block: str) -> bool:
        """Tell whether ``block`` was taken out of the network."""
        gone = block in self._structure.removed
        if gone:
            self._applied.add(block)
        return gone

    def heads(self, attention: str, most: int) -> int:
        """Return how many of its ``most`` heads ``attention`` has left."""
        return self._left(self._structure.heads, attention, most)

    def channels(self, feed_forward: str, most: int) -> int:
        """Return how many channels are left between the two layers of ``feed_forward``."""
        return self._left(self._structure.channels, feed_forward, most)

    def check_used(self) -> None:
        """Raise RequestError for a tensor, or a part of the structure, that no layer asked for."""
        left = sorted(set(self._tensors) - self._used)
        left = [name for name in left if not name.endswith(_IGNORED)]
        if left:
            raise RequestError(
                f"{len(left)} of the weights are not in the network that the config describes"
                f" ({left[0][:120]}); the two belong to different models."
            )
        changed = self._structure
        named = {*changed.removed, *changed.heads, *changed.channels, *changed.ranks}
        if extra := sorted(named - self._applied):
            raise wrong(f"names {extra[0][:120]!r}, which this component has not")

    def table(self, name: str, width: int) -> Value:
        """Return the tensor ``name``, rows of ``width`` numbers, as float32."""
        shape = self._tensor(name).shape
        return self._constant(name, (shape[0] if shape else 0, width))

    def linear(self, name: str, x: Value, outputs: int, *, bias: bool = True) -> Value:
        """Return x W^T + b over the last axis; with ``bias`` False b may be missing."""
        if rank := self._low_rank(name, min(outputs, _width(x, -1))):
            x = self.linear(f"{name}.down", x, rank, bias=False)
            name = f"{name}.up"
        weight = self._constant(f"{name}.weight", (outputs, _width(x, -1)))
        product = ops.matmul(x, weight, False, True, name=name)
        shape = [1] * (_rank(product) - 1) + [outputs]
        return self._with_bias(name, product, outputs, shape, bias)

    def conv(
        self,
        name: str,
        x: Value,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        pads: tuple[int, int] | None = None,
        bias: bool = True,
    ) -> Value:
        """Return the convolution of pictures; ``pads`` are pixels before and behind each side.

        None pads so that a picture keeps its size. With ``bias`` False a bias may be missing.
        """
        if rank := self._low_rank(name, min(outputs, _width(x, 1) * kernel**2)):
            down = f"{name}.down"
            x = self.conv(down, x, rank, kernel=kernel, stride=stride, pads=pads, bias=False)
            return self.conv(f"{name}.up", x, outputs, kernel=1, bias=bias)
        before, behind = (kernel // 2, kernel // 2) if pads is None else pads
        weight = self._constant(f"{name}.weight", (outputs, _width(x, 1), kernel, kernel))
        product = ops.convolution(
            x, weight, [stride] * 2, [before] * 2, [behind] * 2, [1, 1], name=name
        )
        return self._with_bias(name, product, outputs, [1, outputs, 1, 1], bias)

    def group_norm(self, name: str, x: Value, groups: int, eps: float) -> Value:
        """Return the group norm of [N, C, ...]."""
        channels = _width(x, 1)
        if channels % groups:
            raise RequestError(
                f"{name} has {channels} channels, which {groups} groups do not divide; the config"
                " and the weights belong to different models."
            )
        scale, bias = (self._constant(f"{name}.{part}", (channels,)) for part in _AFFINE)
        return ops.group_normalization(x, scale, bias, groups, eps, name=name)

    def layer_norm(self, name: str, x: Value, eps: float = 1e-5) -> Value:
        """Return the layer norm over the last axis."""
        width = _width(x, -1)
        shape = [1] * (_rank(x) - 1) + [width]
        scale, bias = (self._constant(f"{name}.{part}", (width,), shape) for part in _AFFINE)
        normed = ops.mvn(x, [-1], True, eps, "inside_sqrt", name=name)
        return ops.add(ops.multiply(normed, scale, name=f"{name}/scale"), bias, name=f"{name}/bias")

    def _left(self, table: Mapping[str, int], name: str, most: int) -> int:
        if name not in table:
            return most
        self._applied.add(name)
        return within(name, table[name], most)

    def _low_rank(self, name: str, most: int) -> int:
        """Return the rank of the two layers that stand where ``name`` was; 0: it stands there."""
        ranks = self._structure.ranks
        return self._left(ranks, name, most) if name in ranks else 0

    def _with_bias(
        self, name: str, product: Value, outputs: int, shape: list[int], required: bool
    ) -> Value:
        if not required and not self.has(f"{name}.bias"):
            return product
        bias = self._constant(f"{name}.bias", (outputs,), shape)
        return ops.add(product, bias, name=f"{name}/bias")

    def _constant(self, name: str, expected: tuple[int, ...], shape: Any = None) -> Value:
        """Return the tensor ``name`` as float32, checked, and seen as ``shape``."""
        tensor = self._tensor(name)
        if tensor.shape != expected:
            raise RequestError(
                f"{name} has the shape {list(tensor.shape)} and the config makes it"
                f" {list(expected)}; they belong to different models."
            )
        array = tensor.read().reshape(expected if shape is None else shape)
        constant = _constant_of(array, tensor.dtype, name)
        if tensor.dtype == "F32":
            return constant
        return ops.convert(constant, "f32", name=f"{name}/f32")

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise RequestError(
                f"There is no {name} among the weights, which the config asks for; get the model"
                " again, complete."
            )
        tensor = self._tensors[name]
        if tensor.dtype not in _TYPES:
            raise RequestError(
                f"{name} is stored as {tensor.dtype}, which is no float; give another version of"
                " the model."
            )
        self._used.add(name)
        return tensor


def attention(
    q: Value, k: Value, v: Value, heads: int, *, name: str, causal: bool = False
) -> Value:
    """Return softmax(q k^T / sqrt(d)) v by heads; all are tokens, [N, T, heads x d]."""
    query, key, value = (_split_heads(x, heads) for x in (q, k, v))
    result = ops.scaled_dot_product_attention(query, key, value, causal=causal, name=name)
    tokens = ops.transpose(result, [0, 2, 1, 3])
    return ops.reshape(tokens, [0, 0, _width(v, -1)], True)


def _split_heads(x: Value, heads: int) -> Value:
    width = _width(x, -1)
    return ops.transpose(ops.reshape(x, [0, 0, heads, width // heads], True), [0, 2, 1, 3])


def to_tokens(picture: Value) -> Value:
    """Return a picture [N, C, H, W] as tokens [N, H x W, C]."""
    flat = ops.reshape(picture, [0, _width(picture, 1), -1], True)
    return ops.transpose(flat, [0, 2, 1])


def to_picture(tokens: Value, like: Value) -> Value:
    """Return tokens [N, H x W, C] as a picture of the height and width of ``like``."""
    shape = ops.shape_of(like)
    sides = ops.gather(shape, [2, 3], np.int64(0))
    head = ops.gather(shape, [0], np.int64(0))
    whole = ops.concat([head, ops.constant(np.array([_width(tokens, -1)], np.int64)), sides], 0)
    return ops.reshape(ops.transpose(tokens, [0, 2, 1]), whole, False)


def silu(x: Value) -> Value:
    """Return x sigmoid(x)."""
    return ops.swish(x)


def upsample(picture: Value, like: Value | None = None) -> Value:
    """Return a picture with every pixel four times: twice as high and wide, or of ``like``'s size.

    What was halved from an odd number is one less than twice its half.
    """
    if like is None:
        # In the type of saved floats: a Convert behind it would hide the size from who reads it.
        size, how = np.array([2.0, 2.0], np.float16), "scales"
    else:
        size, how = ops.gather(ops.shape_of(like), [2, 3], np.int64(0)), "sizes"
    return ops.interpolate(
        picture,
        size,
        "nearest",
        how,
        [0],
        [0],
        "asymmetric",
        "floor",
        axes=np.array([2, 3], np.int64),
    )


def sinusoid(values: Value, width: int, *, flip_sin_to_cos: bool, shift: float) -> Value:
    """Return sines and cosines of ``values`` [N] at ``width`` / 2 frequencies, [N, width].

    Source: arXiv:1706.03762, section 3.5, as diffusers' `get_timestep_embedding` has it.
    """
    half = width // 2
    exponent = np.arange(half, dtype=np.float64) / (half - shift)
    frequencies = np.exp(-np.log(10_000.0) * exponent).reshape(1, half)
    column = ops.reshape(values, [-1, 1], False)
    angles = ops.multiply(column, _fixed_point(frequencies))
    waves = [ops.sin(angles), ops.cos(angles)]
    return ops.concat(waves[::-1] if flip_sin_to_cos else waves, 1)


def _fixed_point(numbers: Any) -> Value:
    """Return ``numbers``, 0 to 1, as float32 that saving in half precision does not round.

    Saved as float16 a frequency near 1 is off by up to 2^-12, which at timestep 999 is a quarter
    of a radian: the embedding of another timestep.
    """
    whole = np.round(numbers * 2.0**_FIXED_POINT_BITS).astype(np.int32)
    factor = np.float32(2.0 ** (-_FIXED_POINT_BITS / 2))
    scaled = ops.multiply(ops.convert(ops.constant(whole), "f32"), factor)
    return ops.multiply(scaled, factor)


def parameter(name: str, shape: list[int], kind: ov.Type = ov.Type.f32) -> Value:
    """Return an input called ``name``; -1 in ``shape`` is any size."""
    made = ops.parameter(ov.PartialShape(shape), kind, name=name)
    made.output(0).set_names({name})
    return made


def model(
    title: str, inputs: list[Value], outputs: Mapping[str, Value], layers: Layers
) -> ov.Model:
    """Return the graph from ``inputs`` to ``outputs``, tensor names to values.

    Raises RequestError when the checkpoint has tensors that the network does not.
    """
    layers.check_used()
    results = []
    for name, value in outputs.items():
        value.output(0).set_names({*value.output(0).get_names(), name})
        results.append(ops.result(value, name=f"{name}/result"))
    made = ov.Model(results, inputs, title)
    _number_by_place(made)
    return made


def _number_by_place(made: ov.Model) -> None:
    """Number by their place what OpenVINO numbered by all that the process had made before."""
    counts: Counter[str] = Counter()
    for node in made.get_ordered_ops():
        if match := _NUMBERED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{match[1]}.{counts[match[1]]}")
            counts[match[1]] += 1


def whole_divisor(width: int, parts: int, name: str) -> int:
    """Return ``width`` / ``parts``; raises RequestError unless that is a whole number."""
    if parts < 1 or width % parts:
        raise RequestError(f"{name} is {width} wide, which {parts} heads do not divide.")
    return width // parts


def _width(x: Value, axis: int) -> int:
    return int(x.output(0).get_partial_shape()[axis].get_length())


def _rank(x: Value) -> int:
    return int(x.output(0).get_partial_shape().rank.get_length())


def _constant_of(array: Any, dtype: str, name: str) -> Value:
    """Return ``array``, in safetensors' ``dtype``, as a constant that shares its memory."""
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        return ops.constant(array, shared_memory=True, name=name)
    # NumPy has no such type. OpenVINO keeps an array alive, but not a tensor's: addresses in a
    # mapped file, whose pages come and go, are kept instead.
    _MAPPED.append(array)
    tensor = ov.Tensor(array, list(array.shape), _TYPES[dtype])
    return ops.constant(tensor, shared_memory=True, name=name)


_MAPPED: list[Any] = []


def channels_of(picture: Value) -> int:
    """Return C of [N, C, H, W]."""
    return _width(picture, 1)


def width_of(tokens: Value) -> int:
    """Return C of [N, T, C]."""
    return _width(tokens, -1)


def number(value: float) -> Value:
    """Return a float32 constant that saving in half precision does not round."""
    if float(np.float16(value)) == value:
        return ops.constant(np.float32(value))
    return _fixed_point(np.array(value))
