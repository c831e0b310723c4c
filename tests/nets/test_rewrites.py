"""What is written to disk is what the rewrites of graphs know, in every place they should find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from sdvino.graph.cut import cut_at_skip, stage_count
from sdvino.graph.geglu import split_projections
from sdvino.graph.saving import save_graph
from sdvino.graph.text_keys import give_text_keys
from sdvino.graph.text_states import give_states, state_name
from sdvino.graph.timestep import float_timestep
from sdvino.graph.tokens import thin_keys
from sdvino.graph.upsampling import split_upsampling
from sdvino.graph.walk import freeze_shapes, reshape_static
from sdvino.nets.clip import clip
from sdvino.nets.unet import unet
from sdvino.nets.vae import vae_decoder
from sdvino.weights.numbers import relative_error
from tests.nets.test_networks import (
    config_of,
    run,
    tensors_of,
    text_model,
    torch_unet,
    unet_by_torch,
    unet_inputs,
)


def saved(model: ov.Model, folder: Path) -> ov.Model:
    """Return ``model`` as it is read from what was written of it."""
    save_graph(model, folder / "openvino_model.xml", name="unet")
    return ov.Core().read_model(folder / "openvino_model.xml")


@pytest.mark.parametrize("arch", ["tiny-sd15", "tiny-sdxl", "tiny-lcm"])
def test_rewrites_of_a_unet(tmp_path: Path, arch: str) -> None:
    module = torch_unet(config_of(arch, "unet"))
    inputs: dict[str, Any] = {k: v[:1] for k, v in unet_inputs(module.config, 500).items()}
    expected = unet_by_torch(module, inputs)
    model = saved(unet({**module.config}, tensors_of(module)), tmp_path)
    kinds = [type(layer).__name__ for layer in module.modules()]
    float_timestep(model)
    reshape_static(model, {name: list(value.shape) for name, value in inputs.items()})
    for op in model.get_ops():  # nothing is left to be found out when it runs
        assert all(port.get_partial_shape().is_static for port in op.outputs())
    freeze_shapes(model)
    assert split_projections(model) == kinds.count("GEGLU")
    assert stage_count(cut_at_skip(model)) == 3
    inputs["timestep"] = inputs["timestep"].astype(np.float32)
    assert relative_error(run(model, inputs)["out_sample"], expected) < 2e-3  # half precision
    thinned = model.clone()
    assert thin_keys(thinned, 2, (16, 16)) > 0
    give_text_keys(model)
    keys = [op for op in model.outputs if op.get_any_name().startswith("text_key.")]
    assert len(keys) == 2 * kinds.count("BasicTransformerBlock")


def test_upsampling_in_the_decoder_is_split(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    module = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
    )
    model = saved(
        vae_decoder({**module.config}, tensors_of(module.eval().requires_grad_(False))), tmp_path
    )
    assert split_upsampling(model) == 2


@pytest.mark.parametrize("hidden_states", [True, False])
def test_earlier_states_of_a_text_model(tmp_path: Path, hidden_states: bool) -> None:
    import torch

    module, config = text_model()
    ids = np.random.default_rng(0).integers(3, 98, (1, 77))
    ids[0, 30:] = 98
    expected = module(torch.from_numpy(ids), output_hidden_states=True).hidden_states[-2]
    normed = module.text_model.final_layer_norm(expected).numpy()
    tensors = tensors_of(module)
    model = saved(clip(config, tensors, projection=True, hidden_states=hidden_states), tmp_path)
    give_states(model, [1], final_norm=True)
    found = run(model, {"input_ids": ids})[state_name(1)]
    assert relative_error(found, normed) < 2e-3
