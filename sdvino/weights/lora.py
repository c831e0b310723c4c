"""LoRA files: what one holds, decided from its header."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.errors import RequestError
from sdvino.inputs.files import read_json
from sdvino.inputs.plain import NotPlain, parse_json
from sdvino.weights.layouts.lora import COMPONENTS, LoraKey, is_sgm, parse_key
from sdvino.weights.layouts.rename import listed
from sdvino.weights.lora_part import BESIDE, LoraPart, NoPart, is_whole, rank_of, shape_of
from sdvino.weights.numbers import as_float32, check_finite, check_floats, reshaped
from sdvino.weights.safetensors import TensorFile

#: The largest weight to merge a LoRA with.
MAX_WEIGHT = 100.0
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
# Where diffusers keeps PEFT's LoraConfig in a file, and what PEFT calls it beside one.
_METADATA_KEY = "lora_adapter_metadata"
_ADAPTER_CONFIG = "adapter_config.json"
# Keys of metadata that name the model, in kohya's files and in the model spec's.
_TITLES = ("ss_output_name", "modelspec.title")


@dataclass(frozen=True, slots=True)
class Lora:
    """A checked LoRA file (or LoCon, LoHa, LoKr) and the weight to merge it with."""

    path: Path
    weight: float
    #: Who names the layers so: kohya, diffusers or PEFT; several joined by "+" in a mixed file.
    layout: str
    parts: tuple[LoraPart, ...]
    #: Tensors that no layout accounts for.
    unknown: tuple[str, ...]
    is_lcm: bool

    @property
    def name(self) -> str:
        """Return the file's name, without its folder and ending."""
        return self.path.stem


def parse_lora(text: str) -> tuple[Path, float]:
    """Return file and weight of ``FILE[:WEIGHT]``; a Windows drive's colon is none of a weight's.

    Raises RequestError for a weight that is no number, or is over `MAX_WEIGHT`.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    if _NUMBER.fullmatch(tail.strip()):
        return Path(head), check_weight(float(tail))
    if head and Path(head).is_file():
        raise RequestError(f"{tail[:40]!r} is no weight of a LoRA; write --lora {head}:0.8.")
    return Path(text), 1.0


def check_weight(weight: float) -> float:
    """Return ``weight`` as a float; raises RequestError over `MAX_WEIGHT` and for NaN."""
    if not abs(weight) <= MAX_WEIGHT:
        raise RequestError(
            f"The weight of a LoRA is {weight:g}; give a number from -{MAX_WEIGHT:g}"
            f" to {MAX_WEIGHT:g}, usually from 0 to 1."
        )
    return float(weight)


def open_lora(path: Path, weight: float = 1.0) -> Lora:
    """Read the header of the LoRA ``path``, and look whether its weights are numbers.

    Raises RequestError for a file that is no LoRA, is damaged, a pickle, or holds NaN.
    """
    check_weight(weight)
    file = TensorFile.open(path, "a LoRA")
    groups: dict[tuple[str, str], dict[str, tuple[str, LoraKey]]] = {}
    unknown: list[str] = []
    for name in file.tensors:
        key = parse_key(name)
        group = {} if key is None else groups.setdefault((key.component, key.spelling), {})
        if key is None or key.role in group:
            unknown.append(name)
        else:
            group[key.role] = (name, key)
    scales = _peft_scales(file)
    parts: list[LoraPart] = []
    layouts: set[str] = set()
    for group in groups.values():
        if is_whole(group.keys()):
            parts.append(_part(file, group, scales))
            layouts |= {key.layout for role, (_, key) in group.items() if role not in BESIDE}
        else:
            unknown.extend(name for name, _ in group.values())
    if not parts:
        raise RequestError(
            f"{path} holds no LoRA ({listed(unknown)}); give a file that was saved as a LoRA."
        )
    titles = (path.stem, *(file.metadata.get(key, "") for key in _TITLES))
    return Lora(
        path=path,
        weight=weight,
        layout="+".join(sorted(layouts)),
        # The names of diffusers go first where a file holds a layer under both numberings.
        parts=tuple(sorted(parts, key=lambda part: is_sgm(part.spelling))),
        unknown=tuple(unknown),
        is_lcm=any("lcm" in title.lower() for title in titles),
    )


def _part(
    file: TensorFile, group: Mapping[str, tuple[str, LoraKey]], scales: _PeftScales
) -> LoraPart:
    names = {role: name for role, (name, _) in group.items()}
    factors = {role: file.tensors[name] for role, name in names.items() if role != "alpha"}
    if "lora_magnitude_vector" in names.get("magnitude", ""):
        # PEFT's are one for each output, [1, O, 1, 1] of a convolution; LyCORIS' may be of inputs.
        factors["magnitude"] = reshaped(factors["magnitude"], (factors["magnitude"].size,))
    named = {names[role]: tensor for role, tensor in factors.items()}
    check_floats(named, file.path)
    try:
        shape_of(factors)
    except NoPart as error:
        shapes = " and ".join(
            f"{name[:120]} {list(t.shape)}" for name, t in list(named.items())[:2]
        )
        raise RequestError(
            f"{file.path} is no LoRA that can be: its {shapes} do not go together;"
            " download it again or choose another."
        ) from error
    check_finite(named, file.path)
    rank = rank_of(factors)
    key = next(key for role, (_, key) in group.items() if role in factors)
    if rank is None:  # LoKr without a product: nothing is scaled
        scale = 1.0
    elif "alpha" in names:
        scale = _number(file, names["alpha"]) / rank
    else:
        scale = scales.of(key, rank)
    if not math.isfinite(scale):
        raise RequestError(
            f"{file.path} scales {next(iter(named))[:120]} by a number that is none;"
            " download it again or choose another."
        )
    return LoraPart(key.component, key.spelling, tuple(names.values()), factors, scale)


def _number(file: TensorFile, name: str) -> float:
    tensor = file.tensors[name]
    if tensor.size != 1:
        raise RequestError(f"{file.path} gives {name[:120]} as more than one number.")
    return float(as_float32(tensor).reshape(()))


@dataclass(frozen=True, slots=True)
class _PeftScales:
    """Scales of layers by PEFT's LoraConfig, where a file has no tensors called alpha."""

    #: Component -> its LoraConfig.
    configs: Mapping[str, Mapping[str, Any]]

    def of(self, key: LoraKey, rank: int) -> float:
        """Return the scale of one layer; alpha is the rank where nothing says otherwise."""
        config = self.configs.get(key.component)
        if config is None:
            return 1.0
        # LoHa and LoKr of PEFT say alpha.
        alpha = config.get("lora_alpha", config.get("alpha", rank))
        patterns = config.get("alpha_pattern")
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            name = str(name).removeprefix("^")
            if key.layer == name or key.layer.endswith(f".{name}"):
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise RequestError(
                f"A LoRA gives its lora_alpha as {str(alpha)[:40]}; it should be a number."
            )
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _peft_scales(file: TensorFile) -> _PeftScales:
    """Read PEFT's configuration from the file's metadata, or from the file that PEFT puts beside.

    diffusers packs the components' configurations into one object: ``unet.lora_alpha`` ...
    """
    text = file.metadata.get(_METADATA_KEY)
    if text is not None:
        try:
            packed = parse_json(text.encode("utf-8"))
        except NotPlain as error:
            raise RequestError(
                f"The metadata of {file.path} is damaged ({error}); download the LoRA again."
            ) from error
        packed = packed if isinstance(packed, dict) else {}
        configs: dict[str, dict[str, Any]] = {}
        for name, value in packed.items():
            owner, dot, key = name.partition(".")
            if not dot or owner not in COMPONENTS:
                owner, key = "unet", name  # saved from the UNet alone
            configs.setdefault(owner, {})[key] = value
        return _PeftScales(configs)
    beside = file.path.parent / _ADAPTER_CONFIG
    if file.path.name == "adapter_model.safetensors" and beside.is_file():
        config = read_json(beside, _ADAPTER_CONFIG)
        return _PeftScales(dict.fromkeys(COMPONENTS, config))
    return _PeftScales({})
