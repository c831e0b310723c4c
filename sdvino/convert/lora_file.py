"""LoRA files: what one holds, decided from its header before torch is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvino.convert.lora_names import COMPONENTS, LoraKey, is_sgm, parse_key
from sdvino.convert.tensor_file import TensorFile
from sdvino.errors import RequestError
from sdvino.inputs.files import read_json
from sdvino.inputs.plain import NotPlain, parse_json

MAX_WEIGHT = 100.0
_MAX_RANK = 8192
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
# Where diffusers keeps PEFT's LoraConfig in a file, and what PEFT calls it beside one.
_METADATA_KEY = "lora_adapter_metadata"
_ADAPTER_CONFIG = "adapter_config.json"
# Keys of metadata that name the model, in kohya's files and in the model spec's.
_TITLES = ("ss_output_name", "modelspec.title")
_OTHER_KINDS = {"hada_w1_a": "a LoHa", "lokr_w1": "a LoKr", "lokr_w1_a": "a LoKr"}
_NAMED = 3

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What a file does to one layer: the names of its tensors, and their shapes."""

    component: str
    spelling: str
    down: str
    up: str
    mid: str | None
    magnitude: str | None
    alpha: str | None
    #: [rank, in, ...] and [out, rank, ...]; the middle one, between them, is [rank, rank, h, w].
    down_shape: Shape
    up_shape: Shape
    mid_shape: Shape | None
    magnitude_shape: Shape | None
    #: alpha / rank.
    scale: float

    @property
    def delta_shape(self) -> Shape:
        """Return (out, in) or (out, in, h, w): what the part adds to."""
        kernel = self.down_shape[2:] if self.mid_shape is None else self.mid_shape[2:]
        return (self.up_shape[0], self.down_shape[1], *kernel)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the names of its tensors."""
        names = (self.down, self.up, self.mid, self.magnitude, self.alpha)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class Lora:
    """A checked LoRA file and the weight to merge it with."""

    path: Path
    weight: float
    #: kohya, diffusers or PEFT; several joined by "+" where a file mixes them.
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
    """Read the header of the LoRA ``path`` and decide its layout; torch is not needed.

    Raises RequestError for a file that is no LoRA, is damaged, a pickle, or holds NaN.
    """
    check_weight(weight)
    file = TensorFile.open(path, "a LoRA")
    groups: dict[tuple[str, str], dict[str, tuple[str, LoraKey]]] = {}
    unknown: list[str] = []
    for name in file.tensors:
        key = parse_key(name)
        if key is None:
            unknown.append(name)
            continue
        group = groups.setdefault((key.component, key.spelling), {})
        if key.role in group:
            unknown.append(name)
        else:
            group[key.role] = (name, key)
    scales = _peft_scales(file)
    parts: list[LoraPart] = []
    layouts: set[str] = set()
    for group in groups.values():
        if "down" not in group or "up" not in group:
            unknown.extend(name for name, _ in group.values())
            continue
        parts.append(_part(file, group, scales))
        layouts |= {key.layout for _, key in group.values() if key.role == "down"}
    if not parts:
        raise RequestError(_no_lora(path, unknown))
    file.check_finite({name for p in parts for name in p.tensors if name != p.alpha})
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
    shapes = {role: file.tensors[name].shape for role, name in names.items()}
    down, up = shapes["down"], shapes["up"]
    rank = down[0] if down else 0
    mid = shapes.get("mid")
    # LoCon's 3 x 3: down and up are 1 x 1, and the middle one has the kernel.
    fits = (
        len(down) in (2, 4)
        and len(up) in (2, 4)
        and up[1] == rank
        and set(up[2:]) <= {1}
        and 1 <= rank <= _MAX_RANK
        and 0 not in down + up
        and (mid is None or (len(mid) == 4 and mid[:2] == (rank, rank) and set(down[2:]) <= {1}))
    )
    if not fits:
        raise RequestError(
            f"{file.path} is no LoRA that can be: {names['down'][:120]} is {list(down)} and"
            f" {names['up'][:120]} {list(up)}; download it again or choose another."
        )
    if "alpha" in names:
        scale = file.scalar(names["alpha"]) / rank
    else:
        scale = scales.of(group["down"][1], rank)
    if not math.isfinite(scale):
        raise RequestError(
            f"{file.path} scales {names['down'][:120]} by a number that is none;"
            " download it again or choose another."
        )
    return LoraPart(
        component=group["down"][1].component,
        spelling=group["down"][1].spelling,
        down=names["down"],
        up=names["up"],
        mid=names.get("mid"),
        magnitude=names.get("magnitude"),
        alpha=names.get("alpha"),
        down_shape=down,
        up_shape=up,
        mid_shape=mid,
        magnitude_shape=shapes.get("magnitude"),
        scale=scale,
    )


def _no_lora(path: Path, names: Sequence[str]) -> str:
    for name in names:
        kind = _OTHER_KINDS.get(name.rpartition(".")[2])
        if kind is not None:
            return f"{path} is {kind}, which convert does not bake in; choose a LoRA or LoCon."
    return f"{path} holds no LoRA ({listed(names)}); give a file that was saved as a LoRA."


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
        alpha = config.get("lora_alpha", rank)
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


def listed(names: Sequence[str]) -> str:
    """Return the first few of ``names`` and how many more there are."""
    more = len(names) - _NAMED
    listed = ", ".join(name[:120] for name in names[:_NAMED])
    return f"{listed} and {more} more" if more > 0 else listed
