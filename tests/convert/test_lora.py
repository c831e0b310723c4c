"""LoRA files of every layout, merged into small models and held against hand-made weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdvino.convert.lora import (
    Lora,
    check_loras,
    hints,
    merge,
    open_lora,
)
from sdvino.convert.lora_names import parse_key
from sdvino.errors import RequestError
from tests.convert import lora_files
from tests.convert.lora_files import Factors, Model, random_factors, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
SD_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SDXL_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 64,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def build(unet: dict[str, Any], text_encoders: Sequence[str]) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    modules = {name: classes[name](CLIPTextConfig(**TEXT)).eval() for name in text_encoders}
    return {"unet": UNet2DConditionModel.from_config(unet).eval(), **modules}


@pytest.fixture(scope="module")
def sd() -> dict[str, Any]:
    """The modules of a small Stable Diffusion 1.x. Copy before merging."""
    return build(SD_UNET, ["text_encoder"])


@pytest.fixture(scope="module")
def sdxl() -> dict[str, Any]:
    """The modules of a small Stable Diffusion XL. Copy before merging."""
    return build(SDXL_UNET, ["text_encoder", "text_encoder_2"])


def attention(layer: str) -> bool:
    """The layers that the oldest layouts can name."""
    return layer.rpartition(".")[0].endswith(("attn1", "attn2", "to_out", "self_attn"))


def shapes_of(modules: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        component: {n: tuple(w.shape) for n, w in lora_files.layers_of(module).items()}
        for component, module in modules.items()
    }


def check(modules: dict[str, Any], path: Path, expected: Model, weight: float = 1.0) -> None:
    """Merge ``path`` into copies of ``modules`` and compare every weight with ``expected``."""
    lora = open_lora(path, weight)
    assert check_loras([lora], shapes_of(modules)) == ()
    for component, module in modules.items():
        merged = copy.deepcopy(module)
        report = merge(merged, component, [lora])
        found = lora_files.layers_of(merged)
        assert report.unmatched == {}
        assert report.layers == len(expected.factors.get(component, {}))
        assert lora_files.largest_error(found, expected.expected(component, weight)) < 1e-5
        touched = lora_files.changed(found, expected.weights(component))
        assert touched == set(expected.factors.get(component, {}))


@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5])
def test_kohya(sd: dict[str, Any], tmp_path: Path, weight: float) -> None:
    factors = random_factors(sd)
    path = save(tmp_path / "style.safetensors", lora_files.kohya(factors))
    assert open_lora(path).layout == "kohya"
    check(sd, path, Model(sd, factors), weight)


def test_an_alpha_may_be_a_whole_number(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = lora_files.without_alphas(random_factors(sd, take=attention))
    tensors = lora_files.kohya(factors)
    tensors |= {n: value.to(torch.int64) for n, value in tensors.items() if n.endswith("alpha")}
    check(sd, save(tmp_path / "a.safetensors", tensors), Model(sd, factors))


def test_locon_with_a_middle_convolution(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors(sd, locon=True)
    assert any(part.mid is not None for part in factors["unet"].values())
    path = save(tmp_path / "locon.safetensors", lora_files.kohya(factors))
    check(sd, path, Model(sd, factors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats(sd: dict[str, Any], tmp_path: Path, dtype: Any) -> None:
    factors = random_factors(sd, take=attention)
    tensors = {name: value.to(dtype) for name, value in lora_files.kohya(factors).items()}
    path = save(tmp_path / "half.safetensors", tensors)
    for layers in factors.values():
        for part in layers.values():
            part.down, part.up = part.down.to(dtype).float(), part.up.to(dtype).float()
    check(sd, path, Model(sd, factors))


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_kohya_for_sdxl(sdxl: dict[str, Any], tmp_path: Path, naming: str) -> None:
    factors = random_factors(sdxl)
    prefixes = {**lora_files.KOHYA, "text_encoder": "lora_te1"}
    rename: Callable[[str], str] = (
        lora_files.sdxl_original if naming == "original" else lambda layer: layer
    )
    path = save(tmp_path / "xl.safetensors", lora_files.kohya(factors, prefixes, rename))
    check(sdxl, path, Model(sdxl, factors))


def test_sdxl_s_original_names_are_what_diffusers_reads(sdxl: dict[str, Any]) -> None:
    """Our table of names against diffusers' conversion of the same keys."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    factors = random_factors({"unet": sdxl["unet"]})
    tensors = lora_files.kohya(factors, rename=lora_files.sdxl_original)
    theirs, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        dict(tensors), unet_config=sdxl["unet"].config
    )
    downs = {name: value for name, value in theirs.items() if name.endswith("down.weight")}
    assert len(downs) == len(factors["unet"]) == len(alphas)
    spelled = {layer.replace(".", "_"): part for layer, part in factors["unet"].items()}
    spelled |= {name.removesuffix("_0"): part for name, part in spelled.items()}
    for name, value in downs.items():
        key = parse_key(name)
        assert key is not None
        assert torch.equal(value, spelled[key.spelling].down)


def test_peft_with_alphas_in_its_metadata(sdxl: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors(sdxl)
    tensors, metadata = lora_files.peft(factors)
    path = save(tmp_path / "peft.safetensors", tensors, metadata)
    assert open_lora(path).layout == "PEFT"
    check(sdxl, path, Model(sdxl, factors))


def test_peft_without_metadata_has_alpha_equal_to_the_rank(
    sd: dict[str, Any], tmp_path: Path
) -> None:
    factors = lora_files.without_alphas(random_factors(sd))
    path = save(tmp_path / "peft.safetensors", lora_files.peft(factors)[0])
    check(sd, path, Model(sd, factors))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_own_folder(sd: dict[str, Any], tmp_path: Path, rslora: bool) -> None:
    factors = lora_files.without_alphas(random_factors({"unet": sd["unet"]}, take=attention))
    tensors = {
        f"base_model.model.{name}": value
        for name, value in lora_files.peft(factors, prefix=False)[0].items()
    }
    path = save(tmp_path / "adapter_model.safetensors", tensors)
    config = {"lora_alpha": 16, "r": 4, "use_rslora": rslora, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for part in factors["unet"].values():
        part.alpha = 32.0 if rslora else 16.0  # 16 / sqrt(4) is 32 / 4
    check(sd, path, Model(sd, factors))


def test_diffusers_before_peft(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = lora_files.without_alphas(random_factors(sd))
    path = save(tmp_path / "old.safetensors", lora_files.diffusers_old(factors))
    assert open_lora(path).layout == "diffusers"
    check(sd, path, Model(sd, factors))


@pytest.mark.parametrize("prefix", [True, False])
def test_attention_processors(sd: dict[str, Any], tmp_path: Path, prefix: bool) -> None:
    modules = sd if prefix else {"unet": sd["unet"]}
    factors = lora_files.without_alphas(random_factors(modules, take=attention))
    path = save(
        tmp_path / "pytorch_lora_weights.safetensors", lora_files.processors(factors, prefix=prefix)
    )
    check(sd, path, Model(sd, factors))


def test_one_by_one_convolutions_and_linear_layers_are_alike(
    sd: dict[str, Any], sdxl: dict[str, Any], tmp_path: Path
) -> None:
    """proj_in is a convolution in SD 1.x and linear in SDXL; trainers have mixed them up."""
    for name, modules in (("sd", {"unet": sd["unet"]}), ("xl", {"unet": sdxl["unet"]})):
        factors = random_factors(modules, take=lambda layer: layer.endswith("proj_in"))
        for part in factors["unet"].values():
            if part.down.ndim == 4:
                part.down, part.up = part.down[..., 0, 0], part.up[..., 0, 0]
            else:
                part.down, part.up = part.down[..., None, None], part.up[..., None, None]
        path = save(tmp_path / f"{name}.safetensors", lora_files.kohya(factors))
        check(modules, path, Model(modules, factors))


@pytest.mark.parametrize(
    ("layout", "axis"), [("kohya", "output"), ("kohya", "input"), ("peft", "output")]
)
def test_dora(sd: dict[str, Any], tmp_path: Path, layout: str, axis: str) -> None:
    modules = {"unet": sd["unet"]}
    factors = random_factors(modules, take=lambda layer: "attn1" in layer or "conv1" in layer)
    before = lora_files.layers_of(modules["unet"])
    generator = torch.Generator().manual_seed(5)
    expected = {}
    for layer, part in factors["unet"].items():
        direction = before[layer] + part.delta()
        other = [i for i in range(direction.ndim) if i != (0 if axis == "output" else 1)]
        norm = direction.pow(2).sum(dim=other, keepdim=True).sqrt()
        length = torch.rand(norm.shape, generator=generator) + 0.5
        part.magnitude = length.flatten() if layout == "peft" else length
        expected[layer] = length * direction / norm
    if layout == "kohya":
        path = save(tmp_path / "dora.safetensors", lora_files.kohya(factors))
    else:
        path = save(tmp_path / "dora.safetensors", *lora_files.peft(factors))
    for weight in (1.0, 0.25):
        merged = copy.deepcopy(modules["unet"])
        merge(merged, "unet", [open_lora(path, weight)])
        found = lora_files.layers_of(merged)
        part_way = {n: before[n] + weight * (value - before[n]) for n, value in expected.items()}
        assert lora_files.largest_error(found, part_way) < 1e-5


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


needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="diffusers merges LoRAs with peft"
)


def fuse_with_diffusers(modules: dict[str, Any], path: Path, weight: float) -> dict[str, Any]:
    """The same modules after diffusers' load and fuse of the file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    fused = {name: copy.deepcopy(module) for name, module in modules.items()}
    xl = "text_encoder_2" in modules
    loader: Any = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin
    options = {"unet_config": fused["unet"].config} if xl else {}
    state, alphas, metadata = loader.lora_state_dict(
        str(path), return_lora_metadata=True, **options
    )
    extra = {"adapter_name": "ours", "metadata": metadata}
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=fused["unet"], **extra)
    for name in modules:
        if name.startswith("text_encoder"):
            loader.load_lora_into_text_encoder(
                state, network_alphas=alphas, text_encoder=fused[name], prefix=name, **extra
            )
    for module in fused.values():
        for layer in module.modules():
            if hasattr(layer, "lora_A"):
                layer.set_scale("ours", weight)
                layer.merge(adapter_names=["ours"])
    return fused


def unwrapped(module: Any) -> dict[str, Any]:
    """The weights of a module with PEFT's layers in it, under the names from before."""
    return {
        name.replace(".base_layer", ""): weight
        for name, weight in lora_files.layers_of(module).items()
        if ".lora_" not in name
    }


@needs_peft
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", ["kohya", "peft", "peft-plain", "diffusers"])
def test_against_diffusers_own_merge(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, layout: str
) -> None:
    modules = request.getfixturevalue(family)
    factors = random_factors(
        modules, take=lambda layer: attention(layer) or "conv1" in layer or "fc" in layer
    )
    prefixes = {**lora_files.KOHYA, "text_encoder": "lora_te1" if family == "sdxl" else "lora_te"}
    metadata = None
    if layout == "kohya":
        # diffusers loses all but the commonest alpha of kohya's attention layers.
        for layers in factors.values():
            for part in layers.values():
                part.alpha = 1.5
        rename: Callable[[str], str] = lora_files.sdxl_original if family == "sdxl" else str
        tensors = lora_files.kohya(factors, prefixes, rename)
    elif layout == "peft":
        tensors, metadata = lora_files.peft(factors)
    else:
        factors = lora_files.without_alphas(factors)
        plain = layout == "peft-plain"
        tensors = lora_files.peft(factors)[0] if plain else lora_files.diffusers_old(factors)
    path = save(tmp_path / "lora.safetensors", tensors, metadata)
    assert load_file(path)
    fused = fuse_with_diffusers(modules, path, 0.8)
    lora: Lora = open_lora(path, 0.8)
    for component, module in modules.items():
        merged = copy.deepcopy(module)
        merge(merged, component, [lora])
        expected = unwrapped(fused[component])
        assert expected.keys() == lora_files.layers_of(merged).keys()
        assert lora_files.largest_error(lora_files.layers_of(merged), expected) < 1e-5
