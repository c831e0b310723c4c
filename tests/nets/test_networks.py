"""The networks against diffusers' and transformers' own, every family in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from synthetic_architectures import ARCHITECTURES

from sdvino.errors import RequestError
from sdvino.nets.clip import clip
from sdvino.nets.layers import UnknownNetwork
from sdvino.nets.structure import Structure
from sdvino.nets.tiny_vae import tiny_vae
from sdvino.nets.unet import unet
from sdvino.nets.vae import vae_decoder, vae_encoder
from sdvino.train.modules import apply
from sdvino.weights.numbers import relative_error
from sdvino.weights.safetensors import Tensor

MINIATURES = [name for name in ARCHITECTURES if name.startswith("tiny-")]
#: As the issue of the networks has it: relative, in float32.
CLOSE = 1e-5


def config_of(arch: str, part: str) -> dict[str, Any]:
    return dict(ARCHITECTURES[arch]["components"][part][2])


def torch_unet(config: Mapping[str, Any]) -> Any:
    import diffusers
    import torch

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)


def tensors_of(module: Any) -> dict[str, Tensor]:
    return {name: tensor("F32", value.numpy()) for name, value in module.state_dict().items()}


def tensor(dtype: str, array: NDArray[Any]) -> Tensor:
    return Tensor(dtype, tuple(array.shape), lambda: array)


def compile_model(model: ov.Model) -> ov.CompiledModel:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def run(model: ov.Model, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    compiled = compile_model(model)
    results = compiled(dict(inputs))
    return {name: results[port] for port in compiled.outputs for name in port.get_names()}


def unet_inputs(config: Mapping[str, Any], timestep: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(timestep)
    inputs: dict[str, NDArray[Any]] = {
        "sample": rng.standard_normal((2, config.get("in_channels", 4), 16, 16)),
        "encoder_hidden_states": rng.standard_normal((2, 77, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type") == "text_time":
        taken = config["projection_class_embeddings_input_dim"]
        pooled = taken - 6 * config["addition_time_embed_dim"]
        inputs["text_embeds"] = rng.standard_normal((2, pooled))
        inputs["time_ids"] = np.array([[512, 512, 0, 8, 512, 1024]] * 2)
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = rng.standard_normal((2, config["time_cond_proj_dim"]))
    floats: dict[str, NDArray[Any]] = {k: v.astype(np.float32) for k, v in inputs.items()}
    return {**floats, "timestep": np.array([timestep], np.int64)}


def unet_by_torch(module: Any, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    import torch

    given = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    result = module(
        given["sample"],
        given["timestep"],
        given["encoder_hidden_states"],
        timestep_cond=given.get("timestep_cond"),
        added_cond_kwargs=added if added else None,
    )
    array: NDArray[Any] = result.sample.numpy()
    return array


@pytest.mark.parametrize("arch", [*MINIATURES, "pix2pix"])
def test_unets(arch: str) -> None:
    config = config_of("tiny-sd15" if arch == "pix2pix" else arch, "unet")
    if arch == "pix2pix":
        config["in_channels"] = 8
    module = torch_unet(config)
    model = unet({**module.config}, tensors_of(module))
    compiled = compile_model(model)
    for timestep in (999, 500, 1):
        inputs = unet_inputs(config, timestep)
        expected = unet_by_torch(module, inputs)
        assert relative_error(compiled(inputs)["out_sample"], expected) < CLOSE


@pytest.mark.parametrize("size", [(17, 16), (9, 31)])
def test_latents_of_odd_sizes(size: tuple[int, int]) -> None:
    config = config_of("tiny-sd15", "unet")
    module = torch_unet(config)
    inputs = unet_inputs(config, 500)
    noise = np.random.default_rng(0).standard_normal((2, 4, *size))
    inputs["sample"] = noise.astype(np.float32)
    found = run(unet({**module.config}, tensors_of(module)), inputs)["out_sample"]
    assert relative_error(found, unet_by_torch(module, inputs)) < CLOSE


def test_operations_are_called_as_diffusers_calls_their_modules() -> None:
    module = torch_unet(config_of("tiny-sdxl", "unet"))
    model = unet({**module.config}, tensors_of(module))
    products = {
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul")
    }
    layers = {name for name, layer in module.named_modules() if hasattr(layer, "weight")}
    norms = {name for name in layers if "norm" in name}
    assert products == layers - norms


def test_weights_are_not_copied_and_keep_their_type() -> None:
    module = torch_unet(config_of("tiny-sd15", "unet"))
    arrays = {k: v.half().numpy() for k, v in module.state_dict().items()}
    model = unet({**module.config}, {k: tensor("F16", v) for k, v in arrays.items()})
    constants = {op.get_friendly_name(): op for op in model.get_ops()}
    for name, array in arrays.items():
        held = constants[name].get_data()
        assert held.__array_interface__["data"][0] == array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F64"])
def test_every_float_type_of_a_file(dtype: str) -> None:
    import torch

    kinds = {
        "F16": (torch.float16, torch.float16),
        "BF16": (torch.bfloat16, torch.uint16),
        "F8_E4M3": (torch.float8_e4m3fn, torch.uint8),
        "F8_E5M2": (torch.float8_e5m2, torch.uint8),
        "F64": (torch.float64, torch.float64),
    }
    kind, bits = kinds[dtype]
    module = torch_unet(config_of("tiny-sd15", "unet"))
    stored = {name: value.to(kind) for name, value in module.state_dict().items()}
    module.load_state_dict({name: value.float() for name, value in stored.items()})
    tensors = {name: tensor(dtype, value.view(bits).numpy()) for name, value in stored.items()}
    inputs = unet_inputs(module.config, 300)
    found = run(unet({**module.config}, tensors), inputs)["out_sample"]
    assert relative_error(found, unet_by_torch(module, inputs)) < CLOSE


@pytest.mark.parametrize("arch", ["tiny-sd15", "tiny-sdxl"])
def test_pruned_and_low_rank_unets(arch: str) -> None:
    config = config_of(arch, "unet")
    module = torch_unet(config)
    names = [name for name, _ in module.named_modules()]
    block = next(name for name in names if name.endswith("transformer_blocks.0"))
    structure = Structure(
        removed=("mid_block.resnets.1", "mid_block.attentions.0", "up_blocks.0.resnets.1"),
        heads={f"{block}.attn1": 1, f"{block}.attn2": 1},
        channels={f"{block}.ff": 20},
        ranks={
            "down_blocks.0.resnets.0.conv1": 5,
            "time_embedding.linear_1": 7,
            "down_blocks.0.downsamplers.0.conv": 3,
        },
    )
    apply(structure, module)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(std=0.05)
    inputs = unet_inputs(config, 700)
    model = unet({**module.config}, tensors_of(module), structure=structure)
    assert relative_error(run(model, inputs)["out_sample"], unet_by_torch(module, inputs)) < CLOSE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Structure(removed=("down_blocks.2.resnets.0",)), "cannot be left out"),
        (Structure(removed=("conv_in",)), "has not"),
        (Structure(heads={"no.such.layer": 1}), "has not"),
        (Structure(ranks={"conv_in": 37}), "which has"),
        (Structure(ranks={"conv_in": 3}), "no conv_in.down.weight"),
    ],
)
def test_a_structure_that_does_not_fit(change: Structure, said: str) -> None:
    module = torch_unet(config_of("tiny-sd15", "unet"))
    with pytest.raises(RequestError, match=said):
        unet({**module.config}, tensors_of(module), structure=change)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("conv_in.weight", None, "There is no conv_in.weight"),
        ("conv_in.bias", None, "There is no conv_in.bias"),
        ("conv_in.weight", tensor("I64", np.zeros((1,), np.int64)), "stored as I64"),
        ("conv_in.weight", tensor("F32", np.zeros((1,), np.float32)), "has the shape"),
        ("mid_block.more.weight", tensor("F32", np.zeros((1,), np.float32)), "not in the network"),
        ("down_blocks.0.resnets.0.conv_shortcut.bias", tensor("F32", np.zeros(1)), "not in the"),
    ],
)
def test_weights_that_do_not_fit_the_config(name: str, change: Tensor | None, said: str) -> None:
    module = torch_unet(config_of("tiny-sd15", "unet"))
    tensors = {key: value for key, value in tensors_of(module).items() if key != name}
    if change is not None:
        tensors[name] = change
    with pytest.raises(RequestError, match=said):
        unet({**module.config}, tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"class_embed_type": "timestep"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"down_block_types": ["AttnDownBlock2D"] * 4},
        {"cross_attention_dim": [32, 32]},
    ],
)
def test_other_unets_are_said_to_be_unknown(change: dict[str, Any]) -> None:
    with pytest.raises(UnknownNetwork):
        unet({**torch_unet(config_of("tiny-sd15", "unet")).config, **change}, {})


@pytest.mark.parametrize("attention", [True, False])
def test_the_autoencoder(attention: bool) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        mid_block_add_attention=attention,
    )
    module = module.eval().requires_grad_(False)
    structure = Structure(ranks={"decoder.conv_in": 3, "encoder.conv_in": 2})
    apply(structure, module)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(std=0.1)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 8, 16)).astype(np.float32)
    picture = rng.standard_normal((1, 3, 32, 64)).astype(np.float32)
    tensors = tensors_of(module)
    decoded = run(
        vae_decoder({**module.config}, tensors, structure=structure), {"latent_sample": latents}
    )
    expected = module.decode(torch.from_numpy(latents)).sample.numpy()
    assert relative_error(decoded["sample"], expected) < CLOSE
    encoded = run(vae_encoder({**module.config}, tensors, structure=structure), {"sample": picture})
    distribution = module.encode(torch.from_numpy(picture)).latent_dist
    assert relative_error(encoded["latent_parameters"], distribution.parameters.numpy()) < CLOSE


def test_the_tiny_autoencoder() -> None:
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    module = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_decoder_blocks=(2, 1, 1, 1),
    )
    module = module.eval().requires_grad_(False)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype(np.float32)
    found = run(tiny_vae({**module.config}, tensors_of(module)), {"latent_sample": latents})
    expected = module.decode(torch.from_numpy(latents)).sample.numpy()
    assert relative_error(found["sample"], expected) < CLOSE


def text_model(**changes: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=24,
        eos_token_id=98,
        **changes,
    )
    torch.manual_seed(0)
    module = transformers.CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    return module, config.to_dict()


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}], ids=lambda c: str(c)
)
@pytest.mark.parametrize("projection", [True, False])
def test_text_models(changes: dict[str, Any], projection: bool) -> None:
    import torch

    module, config = text_model()
    config = {**config, **changes}
    module.config.update(changes)
    for layer in module.text_model.encoder.layers:
        if config["hidden_act"] == "gelu":
            layer.mlp.activation_fn = torch.nn.GELU()
    module.text_model.eos_token_id = config["eos_token_id"]
    ids = np.random.default_rng(0).integers(3, 98, (2, 77))
    ids[0, 20:], ids[1, 50:] = 98, 98
    tensors = tensors_of(module)
    if not projection:
        del tensors["text_projection.weight"]
    model = clip(config, tensors, projection=projection, hidden_states=True)
    found = run(model, {"input_ids": ids})
    expected = module(torch.from_numpy(ids), output_hidden_states=True)
    assert relative_error(found["last_hidden_state"], expected.last_hidden_state.numpy()) < CLOSE
    for i in range(3):
        state = expected.hidden_states[i].numpy()
        assert relative_error(found[f"hidden_states.{i}"], state) < CLOSE
    pooled = module.text_model(torch.from_numpy(ids)).pooler_output
    if projection:
        assert relative_error(found["text_embeds"], expected.text_embeds.numpy()) < CLOSE
    else:
        assert relative_error(found["pooler_output"], pooled.numpy()) < CLOSE


def test_a_text_model_of_another_kind_is_unknown() -> None:
    module, config = text_model()
    with pytest.raises(UnknownNetwork):
        clip({**config, "hidden_act": "relu"}, tensors_of(module), projection=True)


@pytest.mark.slow
def test_stable_diffusion_at_its_real_size() -> None:
    import torch

    config = config_of("sd15", "unet")
    module = torch_unet(config)
    inputs = unet_inputs(config, 500)
    model = unet({**module.config}, tensors_of(module))
    with torch.inference_mode():
        expected = unet_by_torch(module, inputs)
    assert relative_error(run(model, inputs)["out_sample"], expected) < CLOSE
