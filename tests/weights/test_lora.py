"""LoRA files of every layout, merged into small models and held against hand-made weights."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdvino.weights.layouts.lora import parse_key
from sdvino.weights.lora import open_lora
from tests.weights import lora_files
from tests.weights.lora_files import Model, random_factors, save
from tests.weights.lora_modules import attention, check, merged_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
        found = merged_layers(modules["unet"], "unet", [open_lora(path, weight)])
        part_way = {n: before[n] + weight * (value - before[n]) for n, value in expected.items()}
        assert lora_files.largest_error(found, part_way) < 1e-5


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
    lora = open_lora(path, 0.8)
    for component, module in modules.items():
        found = merged_layers(module, component, [lora])
        expected = unwrapped(fused[component])
        assert expected.keys() == found.keys()
        assert lora_files.largest_error(found, expected) < 1e-5
