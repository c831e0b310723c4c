"""LoHa and LoKr, in LyCORIS' naming and PEFT's, held against PEFT's merge of the same factors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdvino.weights.lora import open_lora
from tests.weights import lora_files
from tests.weights.lora_modules import merged_layers

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TARGETS = ["conv1", "to_q", "proj_in", "fc1"]
RANKS = {"loha": 4, "lokr": 1}


def adapted(module: Any, kind: str, alpha: float, **options: Any) -> Any:
    """A copy of ``module`` with PEFT's layers in it, their factors random."""
    config: Any = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    torch.manual_seed(1)
    options |= {"r": RANKS[kind], "alpha": alpha, "target_modules": TARGETS, "init_weights": False}
    return peft.get_peft_model(copy.deepcopy(module), config(**options))


def factors_of(model: Any) -> dict[str, Any]:
    """The factors, by PEFT's names without the adapter's."""
    return {
        name.removesuffix(".default").removeprefix("base_model.model."): 0.3 * value.detach()
        for name, value in model.named_parameters()
        if name.endswith(".default")
    }


def merged_by_peft(model: Any, factors: dict[str, Any]) -> dict[str, Any]:
    for name, value in factors.items():
        model.get_parameter(f"base_model.model.{name}.default").data = value
    return lora_files.layers_of(model.merge_and_unload())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("naming", ["LyCORIS", "PEFT"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_effective_conv2d": True}, {"decompose_both": True, "decompose_factor": 2}],
    ids=["flat", "tucker", "both"],
)
def test_against_peft(
    sd: dict[str, Any], tmp_path: Path, kind: str, naming: str, options: dict[str, Any]
) -> None:
    if kind == "loha" and "decompose_both" in options:
        pytest.skip("of LoKr alone")
    unet = sd["unet"]
    alpha = 2.0
    model = adapted(unet, kind, alpha, **options)
    factors = factors_of(model)
    layers = {name.rpartition(".")[0] for name in factors}
    full = {layer for layer in layers if {f"{layer}.lokr_w1", f"{layer}.lokr_w2"} <= set(factors)}
    tensors = {}
    if naming == "PEFT":
        tensors = {f"base_model.model.{name}": value for name, value in factors.items()}
        path = tmp_path / "adapter_model.safetensors"
        config = {"peft_type": kind.upper(), "r": RANKS[kind], "alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        for name, value in factors.items():
            layer, _, role = name.rpartition(".")
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors |= {f"{stem}.{role}": value, f"{stem}.alpha": torch.tensor(alpha)}
        path = tmp_path / "lycoris.safetensors"
    lora = open_lora(lora_files.save(path, tensors), 0.5)
    assert {part.scale for part in lora.parts} <= {alpha / RANKS[kind], 1.0}
    found = merged_layers(unet, "unet", [lora])
    before = lora_files.layers_of(unet)
    assert lora_files.changed(found, before) == layers
    expected = merged_by_peft(model, factors)
    for layer in layers:
        change = expected[layer] - before[layer]
        if layer in full:  # LyCORIS scales nothing where nothing has a rank
            change = change * RANKS[kind] / alpha
        assert float((found[layer] - before[layer] - 0.5 * change).abs().max()) < 1e-5, layer
    assert layers - full
