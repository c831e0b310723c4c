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

from sdvino.errors import RequestError
from sdvino.train.modules import load_module
from sdvino.weights.lora import open_lora
from sdvino.weights.lora_merge import check_loras, hints, merge
from sdvino.weights.numbers import as_float32, of_array
from sdvino.weights.safetensors import Tensor
from tests.weights import lora_files
from tests.weights.lora_files import Factors, Model, random_factors, save
from tests.weights.lora_modules import SD_UNET, all_tensors, attention, merged_layers, tensors_of

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
    for layer, value in merged_layers(unet, "unet", [open_lora(path, weight)]).items():
        merged.get_submodule(layer).weight.data = value
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
    found = merged_layers(sd["unet"], "unet", loras)
    expected = Model(sd, first).expected("unet", 0.7)
    for layer, part in lora_files.without_alphas(second)["unet"].items():
        expected[layer] = expected[layer] - 0.4 * part.delta().reshape(expected[layer].shape)
    assert lora_files.largest_error(found, expected) < 1e-5
    turned = merged_layers(sd["unet"], "unet", loras[::-1])
    assert lora_files.largest_error(turned, found) < 1e-6


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
    both = [open_lora(path, weight), open_lora(path, -weight)]
    at_once = merged_layers(sd["text_encoder"], "text_encoder", both)
    assert not lora_files.changed(at_once, before)
    in_turn = tensors_of(sd["text_encoder"])
    for lora in both:
        in_turn = merge(in_turn, [lora], "text_encoder")
    found = {n: torch.from_numpy(as_float32(in_turn[f"{n}.weight"])) for n in before}
    assert lora_files.largest_error(found, before) < 1e-5


def test_weight_zero_changes_nothing(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    tensors = tensors_of(sd["unet"])
    merged = merge(tensors, [open_lora(path, 0.0)], "unet")
    assert all(merged[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("dtype", "merged_to"),
    [("F32", "F32"), ("F64", "F32"), ("F16", "F16"), ("BF16", "F16"), ("F8_E4M3", "F16")],
)
def test_a_merged_weight_s_type(
    sd: dict[str, Any], tmp_path: Path, dtype: str, merged_to: str
) -> None:
    kinds = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16}
    kinds |= {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    factors = random_factors({"unet": sd["unet"]}, take=lambda layer: layer == "conv_in")
    path = save(tmp_path / "a.safetensors", lora_files.kohya(factors))
    before = sd["unet"].conv_in.weight.detach().to(kinds[dtype])
    bits = {"BF16": torch.uint16, "F8_E4M3": torch.uint8}.get(dtype)
    array = (before if bits is None else before.view(bits)).numpy()
    tensors = {"conv_in.weight": of_array(array, dtype)}
    (merged,) = merge(tensors, [open_lora(path, 0.5)], "unet").values()
    assert merged.dtype == merged_to
    assert str(merged.read().dtype) == {"F32": "float32", "F16": "float16"}[merged_to]
    expected = before.float() + 0.5 * factors["unet"]["conv_in"].delta()
    assert float((torch.from_numpy(as_float32(merged)) - expected).abs().max()) < 2e-3
    assert tensors["conv_in.weight"].read() is array


def test_nothing_is_read_before_it_is_asked_for(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))

    def read() -> Any:
        raise AssertionError

    tensors = {n: Tensor(t.dtype, t.shape, read) for n, t in tensors_of(sd["unet"]).items()}
    assert merge(tensors, [open_lora(path)], "unet") == tensors


def test_a_torch_module_takes_the_merged_tensors(sd: dict[str, Any], tmp_path: Path) -> None:
    """As passes load what they work on."""
    factors = random_factors({"unet": sd["unet"]})
    path = save(tmp_path / "a.safetensors", lora_files.kohya(factors))
    tensors = merge(tensors_of(sd["unet"]), [open_lora(path, 0.5)], "unet")
    found = lora_files.layers_of(load_module("unet", SD_UNET, tensors))
    expected = Model(sd, factors).expected("unet", 0.5)
    assert lora_files.largest_error(found, expected) < 1e-5
    del tensors["conv_in.bias"]
    with pytest.raises(RequestError, match=r"do not fit its config\.json \(conv_in\.bias\)"):
        load_module("unet", SD_UNET, tensors)


def test_other_components_are_left_alone(sd: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora_files.kohya(random_factors(sd)))
    tensors = tensors_of(torch.nn.Linear(2, 2))
    assert merge(tensors, [open_lora(path)], "vae") == tensors


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
    (sentence,) = check_loras([open_lora(path)], all_tensors(sd))
    assert "5 tensors of the LoRA mixed fit nothing" in sentence
    assert "and 2 more" in sentence
    assert sum(name in sentence for name in unknown) == 3


def test_a_layer_under_two_names_is_merged_once(sdxl: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors({"unet": sdxl["unet"]}, take=lambda layer: layer.endswith("to_q"))
    tensors = lora_files.kohya(factors, rename=lora_files.sdxl_original)
    tensors |= lora_files.kohya(factors)
    lora = open_lora(save(tmp_path / "twice.safetensors", tensors))
    (sentence,) = check_loras([lora], all_tensors(sdxl))
    assert f"{3 * len(factors['unet'])} tensors" in sentence
    assert "input_blocks" in sentence
    found = merged_layers(sdxl["unet"], "unet", [lora])
    expected = Model(sdxl, factors).expected("unet")
    assert lora_files.largest_error(found, expected) < 1e-5


WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}


@pytest.mark.parametrize("ours", WIDTHS)
@pytest.mark.parametrize("theirs", WIDTHS)
def test_another_family_is_told_by_the_text_s_width(tmp_path: Path, ours: int, theirs: int) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = of_array(np.zeros((640, ours), np.float16), "F16")
    model = {"unet": {f"{layer}.weight": weight}}
    name = "input_blocks_4_1" if theirs == 2048 else "down_blocks_1_attentions_0"
    stem = f"lora_unet_{name}_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": torch.zeros(4, theirs),
        f"{stem}.lora_up.weight": torch.zeros(640, 4),
    }
    lora = open_lora(save(tmp_path / "a.safetensors", tensors))
    if ours == theirs and ours != 2048:
        assert check_loras([lora], model) == ()
    elif ours != theirs:
        with pytest.raises(RequestError, match=f"is for {WIDTHS[theirs]}.*is {WIDTHS[ours]}"):
            check_loras([lora], model)


def test_a_lora_of_another_architecture_is_refused(sd: dict[str, Any], tmp_path: Path) -> None:
    flux = {
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 32),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 4),
    }
    lora = open_lora(save(tmp_path / "flux.safetensors", flux))
    with pytest.raises(RequestError, match=r"Nothing in the LoRA .* fits this model"):
        check_loras([lora], all_tensors(sd))


def test_a_layer_of_another_shape_is_refused_before_and_while_merging(
    sd: dict[str, Any], tmp_path: Path
) -> None:
    factors = random_factors({"unet": sd["unet"]})
    part = factors["unet"]["conv_in"]
    factors["unet"]["conv_in"] = Factors(torch.zeros(4, 9, 3, 3), part.up, 4.0)
    lora = open_lora(save(tmp_path / "inpaint.safetensors", lora_files.kohya(factors)))
    with pytest.raises(RequestError, match=r"conv_in is \[16, 9, 3, 3\].*here it is \[16, 4"):
        check_loras([lora], all_tensors(sd))
    with pytest.raises(RequestError, match="for another model"):
        merge(tensors_of(sd["unet"]), [lora], "unet")


def test_overflow_is_an_error(sd: dict[str, Any], tmp_path: Path) -> None:
    factors = random_factors({"unet": sd["unet"]}, take=attention)
    for part in factors["unet"].values():
        part.down, part.up = part.down * 1e20, part.up * 1e20
    lora = open_lora(save(tmp_path / "a.safetensors", lora_files.kohya(factors)))
    with pytest.raises(RequestError, match="overflows with the LoRA a"):
        merged_layers(sd["unet"], "unet", [lora])


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


def test_lengths_of_a_square_convolution_as_peft_saves_them(tmp_path: Path) -> None:
    """PEFT saves [1, O, 1, 1], one for each output; of a square kernel the shape does not tell."""
    from sdvino.weights.lora import open_lora
    from sdvino.weights.lora_merge import merge
    from sdvino.weights.numbers import of_array
    from sdvino.weights.safetensors import write_tensors

    layer, rng = "mid_block.resnets.0.conv1", np.random.default_rng(0)
    weight = rng.standard_normal((6, 6, 3, 3)).astype(np.float32)
    down = rng.standard_normal((2, 6, 3, 3)).astype(np.float32)
    up = rng.standard_normal((6, 2, 1, 1)).astype(np.float32)
    lengths = np.arange(1, 7, dtype=np.float32).reshape(1, 6, 1, 1)
    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": lengths}
    file = tmp_path / "dora.safetensors"
    write_tensors(file, {f"unet.{layer}.{k}": of_array(v, "F32") for k, v in parts.items()})
    tensors = {f"{layer}.weight": of_array(weight, "F32")}
    merged = merge(tensors, [open_lora(file, 1.0)], "unet")[f"{layer}.weight"].read()
    found = np.sqrt(np.square(merged).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(found, lengths.ravel(), rtol=1e-5)
