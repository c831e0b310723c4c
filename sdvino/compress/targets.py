"""What a quantized model should be like for the machine that is to run it, as data.

8-bit products are summed in 16 bits by processors without VNNI, and large ones saturate: there
weights take half of their range (NNCF's overflow fix). Measured on such a processor with the demo's
UNet, unseen prompts: the error of the prediction is 6.3 % without the fix, 5.3 % with the first
layers' weights halved (NNCF's default) and 3.2 % with all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from sdvino.runtime.topology import cpu_class, read_cpu
from sdvino.settings import check_choice

TargetName = Literal["avx2", "avx2-vnni", "avx512-vnni", "amx", "gpu"]
OverflowFix = Literal["off", "first-layer", "all"]

#: What `--target` takes.
TARGETS: tuple[str, ...] = ("auto", *get_args(TargetName))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of machine, and what quantization does for it."""

    name: TargetName
    #: For people.
    summary: str
    #: Whose weights take half of their range.
    overflow_fix: OverflowFix
    #: Whether attention's own products are faster in 8 bits.
    quantize_attention: bool
    #: Activations around zero: what the device's kernels take.
    symmetric_activations: bool = False


# Attention in 8 bits: facts of this project, measured at Stable Diffusion 1.5's size. With AVX-512
# it is no faster than in f32, with AVX2-VNNI it is (4.2 -> 3.7 s an evaluation); without VNNI
# OpenVINO multiplies matrices by a plain gemm, and Intel's GPUs have a fused kernel in f16.
_TABLE: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                name="avx2",
                summary="processors without VNNI (AVX2, or AVX-512 before Cascade Lake)",
                overflow_fix="all",
                quantize_attention=False,
            ),
            Target(
                name="avx2-vnni",
                summary="Intel Core from the 12th generation on, Core Ultra",
                overflow_fix="off",
                quantize_attention=True,
            ),
            Target(
                name="avx512-vnni",
                summary="Intel Core of the 10th and 11th generation, Xeon, AMD Zen 4",
                overflow_fix="off",
                quantize_attention=False,
            ),
            Target(
                name="amx",
                summary="Xeon from Sapphire Rapids on",
                overflow_fix="off",
                quantize_attention=False,
            ),
            Target(
                name="gpu",
                summary="Intel GPUs, integrated or not",
                overflow_fix="off",
                quantize_attention=False,
                symmetric_activations=True,
            ),
        )
    }
)


def get_target(name: str) -> Target:
    """Return the target called ``name``; "auto" is this machine's processor.

    Raises RequestError, naming the targets, for another name.
    """
    check_choice("target", name, TARGETS)
    return _TABLE[detect(read_cpu().isa) if name == "auto" else name]


def detect(isa: Collection[str]) -> TargetName:
    """Return the target of a processor with the instruction sets ``isa``.

    Where they cannot be told (Windows does not say whether there is VNNI), the one whose model is
    right everywhere: half the weights' range costs little where it is not needed, and an overflow
    costs the picture.
    """
    kind = cpu_class(isa)
    return "avx2" if kind == "arm" else kind


def target_of(device: str, isa: Collection[str]) -> Target | None:
    """Return the target to convert for on ``device``; None where none is made for it.

    ``isa`` are the instruction sets of this machine's processor.
    """
    kind = device.partition(".")[0]
    name = detect(isa) if kind == "CPU" else "gpu" if kind == "GPU" else None
    return None if name is None else _TABLE[name]
