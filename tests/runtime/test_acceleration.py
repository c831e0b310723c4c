from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdvino.compress.recipes import RECIPES
from sdvino.compress.targets import TARGETS, get_target
from sdvino.errors import ModelFolderError, RequestError
from sdvino.folder.manifest import Accelerated, Manifest
from sdvino.graph.geglu import split_projections
from sdvino.graph.linears import linears_to_convolutions
from sdvino.graph.norms import group_norms_to_channels
from sdvino.graph.scales import fold_scales
from sdvino.graph.text_keys import take_text_keys
from sdvino.runtime.acceleration import (
    TABLE,
    Acceleration,
    accelerate,
    channel_norms,
    cpu_class,
    linear_kernel,
    matching,
    with_stored,
)
from sdvino.settings import DeviceSettings, RunSettings

LAPTOP = ("AVX2", "AVX-VNNI")
SERVER = ("AVX2", "AVX-512", "AVX512-VNNI", "AMX-INT8")

#: The names that the table speaks of, and what they stand for.
EXACT = {
    "split-projections": split_projections,
    "fold-scales": fold_scales,
    "text-keys": take_text_keys,
    "linears-to-convolutions": linears_to_convolutions,
    "group-norms-to-channels": group_norms_to_channels,
}


@pytest.mark.parametrize("kind", TABLE)
def test_every_row_names_what_there_is(kind: str) -> None:
    found = accelerate(kind)
    assert found.stored.kind == kind
    assert found.recipe in RECIPES
    assert found.target is None or found.target in TARGETS
    assert set(found.stored.rewrites) <= set(EXACT)
    assert found.why
    assert all(line.strip() for line in found.lines())
    if found.target is not None and kind != "npu":
        assert get_target(found.target).name == kind


@pytest.mark.parametrize(
    ("device", "isa", "kind", "precision", "recipe"),
    [
        ("CPU", (), "avx2", "f32", "int8"),
        ("cpu", LAPTOP, "avx2-vnni", "f32", "int8"),
        ("CPU", SERVER, "amx", "bf16", "int8"),
        ("CPU", ("NEON",), "arm", None, "int8-weights"),
        ("AVX512-VNNI", (), "avx512-vnni", None, "int8"),
        ("GPU.1", LAPTOP, "gpu", "f16", "int8"),
        ("NPU", LAPTOP, "npu", None, "int8"),
        ("FPGA", LAPTOP, "plugin", None, "fp16"),
        ("HETERO:GPU,CPU", LAPTOP, "gpu+avx2-vnni", None, "int8"),
        ("HETERO:FPGA,CPU", LAPTOP, "plugin+avx2-vnni", None, "fp16"),
        ("AUTO", LAPTOP, "avx2-vnni+gpu", None, "int8"),
        ("AUTO:-GPU", LAPTOP, "avx2-vnni", None, "int8"),
    ],
)
def test_what_pays_on_a_device(
    device: str, isa: tuple[str, ...], kind: str, precision: str | None, recipe: str
) -> None:
    found = accelerate(device, isa)
    assert (found.stored.kind, found.stored.precision, found.recipe) == (kind, precision, recipe)


def test_a_list_takes_what_none_of_its_devices_minds() -> None:
    both = accelerate("HETERO:GPU,CPU", ())
    assert both.stored.rewrites == ("fold-scales", "text-keys")
    # Half-range weights are right everywhere, and a GPU's are not right without VNNI.
    assert both.target == "avx2"
    assert accelerate("HETERO:FPGA,CPU").stored.rewrites == ()
    assert accelerate("HETERO:FPGA,CPU").target is None


@pytest.mark.parametrize(
    "device", ["", "HETERO", "HETERO:", "AUTO:-CPU,-GPU", "a b", "GPU:0", "HETERO:GPU,the moon"]
)
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(RequestError, match=r"such as|no device"):
        accelerate(device)


def test_the_class_of_a_processor_that_does_not_tell() -> None:
    assert cpu_class(()) == "avx2"
    assert cpu_class(("NEON", "dot product")) == "arm"


STORED = (
    Accelerated(device="CPU", kind="amx", precision="bf16"),
    Accelerated(device="GPU", kind="gpu", precision="f16", rewrites=("text-keys",)),
)


def test_linear_layers_are_convolutions_where_products_have_no_kernel_of_8_bits() -> None:
    assert linear_kernel(("AVX2",)) == "convolution"
    assert linear_kernel(()) == "convolution"
    assert linear_kernel(LAPTOP) == linear_kernel(SERVER) == linear_kernel(("NEON",)) == "matmul"


def test_group_norms_are_of_channels_where_that_was_measured() -> None:
    assert channel_norms(("AVX2",))
    assert channel_norms(())
    assert not any(map(channel_norms, (LAPTOP, SERVER, ("NEON",))))


def test_what_is_stored_counts_where_the_device_is_alike() -> None:
    assert matching(STORED, "CPU", SERVER) == STORED[0]
    assert matching(STORED, "CPU", LAPTOP) is None
    assert matching(STORED, "gpu.1", LAPTOP) == STORED[1]
    assert matching(STORED, "NPU", SERVER) is None
    hetero = accelerate("HETERO:GPU,CPU", LAPTOP).stored
    assert matching([hetero], "HETERO:GPU,CPU", LAPTOP) == hetero
    assert matching([hetero], "GPU", LAPTOP) is None


def test_a_run_takes_from_the_folder_what_nobody_asked_for() -> None:
    settings = RunSettings(
        components={
            "unet": DeviceSettings(device="GPU"),
            "vae": DeviceSettings(precision="f32"),
        }
    )
    found = with_stored(settings, STORED, SERVER)
    assert found.default.precision == "bf16"
    assert found.components["vae"].precision == "f32"
    # A GPU is asked whether it has f16.
    assert found.components["unet"].precision is None
    assert with_stored(settings, STORED, LAPTOP).default == settings.default
    assert with_stored(settings, (), SERVER) is settings


def test_the_manifest_keeps_it() -> None:
    manifest = Manifest(source="x", family="sd1", recipe="int8", components={}, accelerated=STORED)
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    plain = replace(manifest, accelerated=())
    assert "accelerated" not in plain.to_dict()
    wrong: tuple[Any, ...] = ([3], [{"device": "CPU", "kind": "x", "precision": "f8"}], "CPU", [{}])
    for broken in wrong:
        with pytest.raises(ModelFolderError):
            Manifest.from_dict({**plain.to_dict(), "accelerated": broken})


def test_lines_say_what_and_why() -> None:
    found: Acceleration = accelerate("CPU", LAPTOP)
    first, *reasons = found.lines()
    for word in ("CPU (avx2-vnni)", "int8 made for avx2-vnni", "f32", "text-keys"):
        assert word in first
    assert len(reasons) == len(found.why)
