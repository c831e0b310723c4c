from __future__ import annotations

import pytest

from sdvino.compress.targets import TARGETS, detect, get_target, target_of
from sdvino.errors import RequestError


@pytest.mark.parametrize(
    ("isa", "target"),
    [
        ((), "avx2"),
        (("AVX2",), "avx2"),
        (("AVX2", "AVX-512"), "avx2"),
        (("AVX2", "AVX-VNNI"), "avx2-vnni"),
        (("AVX2", "AVX-512", "AVX512-VNNI"), "avx512-vnni"),
        (("AVX2", "AVX-512", "AVX-VNNI", "AVX512-VNNI", "AMX-INT8"), "amx"),
    ],
)
def test_a_processor_is_told_by_its_instructions(isa: tuple[str, ...], target: str) -> None:
    assert detect(isa) == target


def test_only_processors_without_vnni_need_the_overflow_fix() -> None:
    fixes = {name: get_target(name).overflow_fix for name in TARGETS if name != "auto"}
    assert fixes.pop("avx2") == "all"
    assert set(fixes.values()) == {"off"}


def test_attention_is_quantized_where_that_is_faster() -> None:
    faster = [name for name in TARGETS if name != "auto" and get_target(name).quantize_attention]
    assert faster == ["avx2-vnni"]


def test_auto_is_a_processor_of_the_table() -> None:
    assert get_target("auto").name in TARGETS
    assert get_target("auto").name != "gpu"


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="auto, avx2, avx2-vnni"):
        get_target("sse")


def test_devices_that_a_model_is_made_for() -> None:
    found = {
        name: target_of(name, ("AVX2", "AVX-VNNI")) for name in ("CPU", "GPU.1", "NPU", "FPGA")
    }
    names = {device: None if target is None else target.name for device, target in found.items()}
    assert names == {"CPU": "avx2-vnni", "GPU.1": "gpu", "NPU": None, "FPGA": None}
