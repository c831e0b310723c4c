"""What merging a LoRA does beyond its weights: sums, hints, refusals, what is left alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdvino.convert.lora import (
    check_loras,
    hints,
    merge,
    open_lora,
)
from sdvino.errors import RequestError
from tests.convert import lora_files
from tests.convert.lora_files import Factors, Model, random_factors, save
from tests.convert.lora_modules import attention, shapes_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_the_merged_module_answers_as_one_with_the_layers_beside_it(
    sd: dict[str, Any], tmp_path: Path
) -> None:
    """Outputs of the UNet, against hooks that add up(down(x)) to what each layer gives."""
    unet = copy.deepcopy(sd["unet"])
    factors = random_factors({"unet": unet}, seed=3, rank=2)
    weight = 0.2
    path = save(tmp_path / "a.safetensors", lora_files.kohya(factors))
    merged = copy.deepcopy(unet)
    merge(merged, "unet", [open_lora(path, weight)])
    for layer, part in factors["unet"].items():
        module = unet.get_submodule(layer)

        def add(module: Any, inputs: Any, output: Any, part: Factors = part) -> Any:
            scale = weight * part.alpha / part.down.shape[0]
            if part.down.ndim == 2:
                return output + scale * inputs[0] @ part.down.T @ part.up.T
            inner = torch.nn.functional.conv2d(
                inputs[0], part.down, stride=module.stride, padding=module.padding
            )
            return output + scale * torch.nn.functional.conv2d(inner, part.up)

        module.register_forward_hook(add)
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
    }
    with torch.no_grad():
        expected, found = unet(**arguments).sample, merged(**arguments).sample
        plain = sd["unet"](**arguments).sample
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((plain - expected).norm() / expected.norm()) > 0.05


def test_several_with_weights_are_summed(sd: dict[str, Any], tmp_path: Path) -> None:
    first, second = random_factors(sd, 1), random_factors(sd, 2, take=attention, rank=2)
    loras = [
        open_lora(save(tmp_path / "a.safetensors", lora_files.kohya(first)), 0.7),
        open_lora(
            save(
                tmp_path / "b.safetensors",
                lora_files.peft(lora_files.without_alphas(second))[0],
            ),
            -0.4,
        ),
    ]
    merged = copy.deepcopy(sd["unet"])
    merge(merged, "unet", loras)
    expected = Model(sd, first).expected("unet", 0.7)
    for layer, part in lora_files.without_alphas(second)["unet"].items():
        expected[layer] = expected[layer] - 0.4 * part.delta().reshape(expected[layer].shape)
    assert lora_files.largest_error(lora_files.layers_of(merged), expected) < 1e-5
    turned = copy.deepcopy(sd["unet"])
    merge(turned, "unet", loras[::-1])
    assert (
        lora_files.largest_error(lora_files.layers_of(turned), lora_files.layers_of(merged)) < 1e-6
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(weight=st.floats(-2, 2, allow_subnormal=False))
def test_a_lora_and_its_opposite_are_nothing(
    sd: dict[str, Any], tmp_path: Path, weight: float
) -> None:
    path = tmp_path / "a.safetensors"
    if not path.exists():
        save(path, lora_files.kohya(random_factors(sd, take=attention)))
    before = lora_files.layers_of(sd["text_encoder"])
    at_once = copy.deepcopy(sd["text_encoder"])
    merge(at_once, "text_encoder", [open_lora(path, weight), open_lora(path, -weight)])
    assert not lora_files.changed(lora_files.layers_of(at_once), before)
    in_turn = copy.deepcopy(sd["text_encoder"])
    for sign in (1, -1):
        merge(in_turn, "text_encoder", [open_lora(path, sign * weight)])
    assert lora_files.largest_error(lora_files.layers_of(in_turn), before) < 1e-5


def test_weight_zero_changes_nothing(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    merged = copy.deepcopy(sd["unet"])
    assert merge(merged, "unet", [open_lora(path, 0.0)]).layers == 0
    before = lora_files.layers_of(sd["unet"])
    assert not lora_files.changed(lora_files.layers_of(merged), before)


def test_a_weight_keeps_its_type(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    merged = copy.deepcopy(sd["unet"]).half()
    merge(merged, "unet", [open_lora(path)])
    assert {value.dtype for value in merged.parameters()} == {torch.float16}


def test_weights_that_the_module_only_seems_to_have(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors({"unet": sd["unet"]})
    path = save(tmp_path / "a.safetensors", lora_files.kohya(factors))
    hollow = copy.deepcopy(sd["unet"])
    mapped = {}
    for name, value in hollow.named_parameters():
        if value.numel() > 2000:
            mapped[name] = value.detach().numpy().astype(np.float16)
            value.data = torch.zeros(1).expand(value.shape)
    before = dict(mapped)
    merge(hollow, "unet", [open_lora(path, 0.5)], mapped)
    found = lora_files.layers_of(hollow)
    for name, array in mapped.items():
        assert array.dtype == np.float16
        assert before[name] is not array
        found[name.removesuffix(".weight")] = torch.from_numpy(array.astype(np.float32))
    expected = Model(sd, factors).expected("unet", 0.5)
    assert 0 < len(mapped) < len(found)
    assert lora_files.largest_error(found, expected) < 2e-3


def test_other_components_are_left_alone(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    assert merge(torch.nn.Linear(2, 2), "vae", [open_lora(path)]).layers == 0


def test_a_lora_can_be_sent_to_another_process(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    lora = open_lora(path, 0.3)
    assert pickle.loads(pickle.dumps(lora)) == lora


def test_what_fits_nothing_is_counted_and_named(sd: dict[str, Any], tmp_path: Path) -> None:
    tensors = lora_files.kohya(random_factors(sd))
    unknown = {f"lora_unet_block_{i}.hada_w1_a": torch.ones(2, 2) for i in range(2)}
    stem = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    unknown |= {
        f"{stem}.lora_down.weight": torch.ones(4, 32),
        f"{stem}.lora_up.weight": torch.ones(64, 4),
        "lora_unet_conv_in.diff_b": torch.ones(16),
    }
    path = save(tmp_path / "mixed.safetensors", tensors | unknown)
    (sentence,) = check_loras([open_lora(path)], shapes_of(sd))
    assert "5 tensors of the LoRA mixed fit nothing" in sentence
    assert "and 2 more" in sentence
    assert sum(name in sentence for name in unknown) == 3
    report = merge(copy.deepcopy(sd["text_encoder"]), "text_encoder", [open_lora(path)])
    assert report.unmatched == {}


def test_a_layer_under_two_names_is_merged_once(sdxl: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors({"unet": sdxl["unet"]}, take=lambda layer: layer.endswith("to_q"))
    tensors = lora_files.kohya(factors, rename=lora_files.sdxl_original)
    tensors |= lora_files.kohya(factors)
    lora = open_lora(save(tmp_path / "twice.safetensors", tensors))
    (sentence,) = check_loras([lora], shapes_of(sdxl))
    assert f"{3 * len(factors['unet'])} tensors" in sentence
    assert "input_blocks" in sentence
    merged = copy.deepcopy(sdxl["unet"])
    merge(merged, "unet", [lora])
    expected = Model(sdxl, factors).expected("unet")
    assert lora_files.largest_error(lora_files.layers_of(merged), expected) < 1e-5


WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}


@pytest.mark.parametrize("ours", WIDTHS)
@pytest.mark.parametrize("theirs", WIDTHS)
def test_another_family_is_told_by_the_text_s_width(tmp_path: Path, ours: int, theirs: int) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    shapes = {"unet": {layer: (640, ours)}}
    name = "input_blocks_4_1" if theirs == 2048 else "down_blocks_1_attentions_0"
    stem = f"lora_unet_{name}_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": torch.zeros(4, theirs),
        f"{stem}.lora_up.weight": torch.zeros(640, 4),
    }
    lora = open_lora(save(tmp_path / "a.safetensors", tensors))
    if ours == theirs and ours != 2048:
        assert check_loras([lora], shapes) == ()
    elif ours != theirs:
        with pytest.raises(RequestError, match=f"is for {WIDTHS[theirs]}.*is {WIDTHS[ours]}"):
            check_loras([lora], shapes)


def test_a_lora_of_another_architecture_is_refused(sd: dict[str, Any], tmp_path: Path) -> None:
    flux = {
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 32),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 4),
    }
    lora = open_lora(save(tmp_path / "flux.safetensors", flux))
    with pytest.raises(RequestError, match=r"Nothing in the LoRA .* fits this model"):
        check_loras([lora], shapes_of(sd))


def test_a_layer_of_another_shape_is_refused_before_and_while_merging(
    sd: dict[str, Any], tmp_path: Path
) -> None:
    factors = random_factors({"unet": sd["unet"]})
    part = factors["unet"]["conv_in"]
    factors["unet"]["conv_in"] = Factors(torch.zeros(4, 9, 3, 3), part.up, 4.0)
    lora = open_lora(save(tmp_path / "inpaint.safetensors", lora_files.kohya(factors)))
    with pytest.raises(RequestError, match=r"conv_in is \[16, 9, 3, 3\].*here it is \[16, 4"):
        check_loras([lora], shapes_of(sd))
    merged = copy.deepcopy(sd["unet"])
    with pytest.raises(RequestError, match="for another model"):
        merge(merged, "unet", [lora])
    before = lora_files.layers_of(sd["unet"])
    assert not lora_files.changed(lora_files.layers_of(merged), before)


def test_overflow_is_an_error(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors({"unet": sd["unet"]}, take=attention)
    for part in factors["unet"].values():
        part.down, part.up = part.down * 1e20, part.up * 1e20
    lora = open_lora(save(tmp_path / "a.safetensors", lora_files.kohya(factors)))
    with pytest.raises(RequestError, match="overflows with the LoRA a"):
        merge(copy.deepcopy(sd["unet"]), "unet", [lora])


@pytest.mark.parametrize(
    ("name", "metadata", "is_lcm"),
    [
        ("lcm-lora-sdv1-5", None, True),
        ("pytorch_lora_weights", {"ss_output_name": "My_LCM_thing"}, True),
        ("pytorch_lora_weights", {"modelspec.title": "LCM for SDXL"}, True),
        ("detail", {"ss_output_name": "detail"}, False),
    ],
)
def test_an_lcm_lora_gets_a_hint(
    sd: dict[str, Any], tmp_path: Path, name: str, metadata: dict[str, str] | None, is_lcm: bool
) -> None:
    tensors = lora_files.kohya(random_factors(sd, take=attention))
    path = save(tmp_path / f"{name}.safetensors", tensors, metadata)
    told = hints([open_lora(path)])
    assert len(told) == is_lcm
    assert all("--suggest steps=4,guidance=1,scheduler=lcm" in line for line in told)
