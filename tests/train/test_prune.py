"""Pruning: weights to zero as NNCF does it, heads, channels and blocks that are gone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from sdvino.compress.passes import Context
from sdvino.errors import RequestError
from sdvino.nets.structure import Structure
from sdvino.train.calls import call, operations, outputs_of, relative_error
from sdvino.train.lean_modules import keep_channels, keep_heads
from sdvino.train.magnitude import kth_value, layers_with_weights
from sdvino.train.modules import load_component
from sdvino.train.prune import Prune, prune_magnitude
from sdvino.train.structured_prune import choose_blocks, choose_widths, prune_blocks
from tests.compress.tiny_unet import CONFIG, calls, tiny_unet
from tests.conftest import SHAPES_SOURCE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_histogram_s_masks_are_nncf_s_on_the_demo(scope: Any) -> None:
    """Trained weights, both scopes: bit for bit the same zeros."""
    whole = load_component(SHAPES_SOURCE / "unet", "unet")
    other = copy.deepcopy(whole)
    untouched = set(vars(whole))
    by_nncf = prune_magnitude(whole, "unet", 0.4, scope, engine="nncf")
    by_us = prune_magnitude(other, "unet", 0.4, scope, engine="histogram")
    assert (by_nncf["engine"], by_us["engine"]) == ("nncf", "histogram")
    assert by_nncf["sparsity_by_layer"] == by_us["sparsity_by_layer"]
    assert by_us["sparsity"] == pytest.approx(0.4, abs=1e-3)
    pairs = zip(whole.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, one), (other_name, two) in pairs:
        assert name == other_name
        assert one.equal(two)
    assert set(vars(whole)) == untouched  # NNCF's hooks are off again


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_the_kth_value_is_exact(k: int) -> None:
    import torch

    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 8
    values[::3] = values[0]  # many the same
    found = kth_value(lambda: iter((values[:300], values[300:].reshape(70, 10))), k)
    assert found == float(values.sort().values[k - 1])


def test_magnitude_leaves_alone_what_it_is_told_to() -> None:
    unet = tiny_unet()
    before = unet.conv_in.weight.clone()
    figures = prune_magnitude(unet, "unet", 0.9, "global", ["^conv_in$"], engine="histogram")
    assert unet.conv_in.weight.equal(before)
    assert "conv_in.weight" not in figures["sparsity_by_layer"]
    zeros = sum(int((weight == 0).sum()) for weight in layers_with_weights(unet).values())
    elements = sum(weight.numel() for weight in layers_with_weights(unet).values())
    assert zeros / (elements - before.numel()) == pytest.approx(figures["sparsity"], abs=1e-3)
    assert "neither time nor memory" in figures["note"]


def test_removed_heads_equal_zeroed_heads() -> None:
    unet, other = tiny_unet(), tiny_unet()
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    keep_heads(unet.get_submodule(name), [0, 3])
    whole = other.get_submodule(name)
    width = whole.to_q.out_features // whole.heads
    whole.to_out[0].weight[:, width : 3 * width] = 0
    assert unet.get_submodule(name).to_q.out_features == 2 * width
    assert relative_error(outputs_of(unet, calls()), outputs_of(other, calls())) < 1e-5


def test_removed_channels_equal_zeroed_channels() -> None:
    unet, other = tiny_unet(), tiny_unet()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    kept = [1, 2, 5, 63]
    keep_channels(unet.get_submodule(name), kept)
    whole = other.get_submodule(name).net[2].weight
    whole[:, [i for i in range(whole.shape[1]) if i not in kept]] = 0
    assert relative_error(outputs_of(unet, calls()), outputs_of(other, calls())) < 1e-5


@pytest.mark.parametrize("method", ["heads", "channels"])
def test_what_adds_nothing_goes_first(method: Any) -> None:
    """A head, and a quarter of the channels, that no weight reads: nothing is lost with them."""
    unet = tiny_unet()
    for name, block in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            block.to_out[0].weight[:, : block.to_out[0].in_features // 4] = 0
        if name.endswith(".ff"):
            block.net[2].weight[:, : block.net[2].in_features // 4] = 0
    reference = outputs_of(unet, calls())
    row = Prune(method=method, share=0.25)
    found = row.run(unet, Structure(), Context(inputs=calls()), lambda share: None)
    assert relative_error(outputs_of(unet, calls()), reference) < 1e-5
    table = found.structure.heads if method == "heads" else found.structure.channels
    assert set(table.values()) == ({3} if method == "heads" else {48, 96})
    assert found.figures["removed"] / found.figures["of"] == pytest.approx(0.25)


def test_widths_are_chosen_by_layer_or_over_all() -> None:
    importance = {"a": np.array([4.0, 3, 2, 1]), "b": np.array([1.0, 1, 100, 1])}
    local = choose_widths(importance, 0.5, "local")
    assert (local["a"], len(local["b"]), 2 in local["b"]) == ([0, 1], 2, True)
    assert choose_widths(importance, 0.375, "global") == {"a": [0, 1, 2, 3], "b": [2]}
    assert choose_widths(importance, 0.99, "global") == {"a": [0], "b": [2]}
    wide = {"a": np.arange(64.0)}
    assert len(choose_widths(wide, 0.4, "local", multiple=16)["a"]) == 48


def test_the_blocks_that_matter_least_go_first() -> None:
    unet = tiny_unet()
    idle = "mid_block.attentions.0"
    unet.get_submodule(idle).proj_out.weight.zero_()
    unet.get_submodule(idle).proj_out.bias.zero_()
    reference = outputs_of(unet, calls())
    counts = operations("unet", CONFIG, Structure())
    found = prune_blocks(unet, Structure(), 0.03, calls())
    assert found.structure.removed == (idle,)
    assert found.figures["damage_by_block"][idle] == 0.0
    assert relative_error(outputs_of(unet, calls()), reference) < 1e-6
    left = operations("unet", CONFIG, found.structure)
    assert sum(left.values()) <= 0.97 * sum(counts.values())


def test_blocks_that_are_not_needed_are_put_back() -> None:
    damage = {"a": 0.1, "b": 0.2, "c": 0.3}
    saved = {"a": 10, "b": 15, "c": 20}
    assert choose_blocks(damage, saved, 20) == ("a", "b")
    assert choose_blocks({**damage, "c": 0.29}, {**saved, "c": 40}, 40) == ("c",)
    assert choose_blocks(damage, saved, 0) == ()
    small_and_large = {"a": 0.04, "b": 0.04, "c": 0.32}
    assert choose_blocks(small_and_large, {"a": 1, "b": 1, "c": 10}, 2) == ("a", "b")
    with pytest.raises(RequestError, match="smaller share"):
        choose_blocks(damage, saved, 46)


def test_a_block_takes_what_was_said_of_its_parts_with_it() -> None:
    structure = Structure(heads={"a.b.attn": 1, "a.bc.attn": 1}, ranks={"a.b.x": 2})
    assert structure.without("a.b") == Structure(removed=("a.b",), heads={"a.bc.attn": 1})


def test_the_demo_bears_pruned_channels_better_than_dead_ones() -> None:
    """Importance means something on trained weights: the least go at little cost."""
    whole = load_component(SHAPES_SOURCE / "unet", "unet")
    rng = np.random.default_rng(0)
    inputs = [
        {
            "sample": rng.standard_normal((1, 4, 16, 16), dtype=np.float32),
            "timestep": np.array([t]),
            "encoder_hidden_states": rng.standard_normal((1, 77, 128), dtype=np.float32),
        }
        for t in (100, 500, 900)
    ]
    reference = [call(whole, sample) for sample in inputs]
    other = copy.deepcopy(whole)
    Prune(method="channels", share=0.3).run(
        whole, Structure(), Context(inputs=inputs), lambda share: None
    )
    for name, block in other.named_modules():
        if name.endswith(".ff"):
            keep_channels(block, range(whole.get_submodule(name).net[2].in_features))
    ours = relative_error(outputs_of(whole, inputs), reference)
    first = relative_error(outputs_of(other, inputs), reference)
    assert ours < 0.6 * first
