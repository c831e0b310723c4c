"""Layers of low rank: exact at full rank, nearest at any other, and never larger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdvino.errors import RequestError
from sdvino.nets.structure import Structure
from sdvino.train.calls import outputs_of, relative_error
from sdvino.train.lean_modules import can_be_low_rank, put
from sdvino.train.low_rank import (
    LowRank,
    Moment,
    Spectrum,
    _moments,
    choose_ranks,
    factors,
    make_low_rank,
    rank_for_energy,
    spectrum_of,
)
from tests.compress.tiny_unet import calls, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def moment_of(layer: Any, inputs: Any) -> Moment:
    """As the pass collects it, for a linear layer and rows of inputs."""
    import torch

    outputs, width = layer.weight.shape
    of_outputs = outputs <= width
    rows = layer(inputs) if of_outputs else inputs
    n = rows.shape[1]
    found = Moment(of_outputs, layer.bias is not None, torch.zeros(n, n), torch.zeros(n))
    found.add(rows)
    return found


def test_full_rank_is_the_original() -> None:
    """Every linear layer and convolution of a UNet as two, none of them thinner than it was."""
    unet = tiny_unet()
    reference = outputs_of(unet, calls())
    layers = {n: m for n, m in unet.named_modules() if can_be_low_rank(m)}
    for name, layer in layers.items():
        put(unet, name, factors(layer, spectrum_of(layer, None).basis))
    assert len(layers) > 40
    assert relative_error(outputs_of(unet, calls()), reference) < 1e-5


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_is_the_original_when_whitened_too(outputs: int, inputs: int, bias: bool) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    x = torch.randn(200, inputs, generator=generator) + 3
    moment = moment_of(layer, x)
    pair = factors(layer, spectrum_of(layer, moment).basis, moment.mean_response(layer))
    torch.testing.assert_close(pair(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_whitening_is_the_best_there_is_for_the_output(
    outputs: int, inputs: int, bias: bool
) -> None:
    """The error is what the discarded energies say, and plain SVD is far behind."""
    import torch

    torch.manual_seed(1)
    layer = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    scales = torch.logspace(0, -2, inputs)
    x = torch.randn(4000, inputs) * scales[torch.randperm(inputs)] + (0.5 if bias else 0.0)
    moment, rank = moment_of(layer, x), 6
    spectrum = spectrum_of(layer, moment)
    pair = factors(layer, spectrum.basis[:, :rank], moment.mean_response(layer))
    plain = factors(layer, spectrum_of(layer, None).basis[:, :rank])
    error = float((pair(x) - layer(x)).square().sum(1).mean())
    assert error == pytest.approx(float(spectrum.energies[rank:].sum()), rel=0.02, abs=1e-6)
    assert error < 0.5 * float((plain(x) - layer(x)).square().sum(1).mean())


def test_whitening_beats_plain_svd_on_the_output_of_a_unet() -> None:
    def error_of(whiten: bool) -> tuple[float, int]:
        unet = tiny_unet()
        reference = outputs_of(unet, calls(8))
        settings = LowRank(budget=0.6, whiten=whiten)
        make_low_rank(unet, Structure(), settings, calls(8) if whiten else ())
        left = sum(parameter.numel() for parameter in unet.parameters())
        return relative_error(outputs_of(unet, calls(8)), reference), left

    (whitened, left), (plain, other_left) = error_of(True), error_of(False)
    assert left == pytest.approx(other_left, rel=0.05)
    assert whitened < 0.95 * plain  # random weights; layer by layer see above


def test_few_timesteps_do_not_make_a_layer_of_low_rank() -> None:
    """Four inputs hold four timesteps: the layers that these go through are judged by weights."""
    unet = tiny_unet()
    layers = {name: layer for name, layer in unet.named_modules() if can_be_low_rank(layer)}
    found = _moments(unet, layers, calls(4), lambda share: None)
    assert "down_blocks.0.resnets.0.conv1" in found
    assert any("time_emb" in name for name in layers)
    assert not any("time_emb" in name for name in found)


def test_a_convolution_becomes_two_with_its_stride() -> None:
    import torch

    torch.manual_seed(2)
    layer = torch.nn.Conv2d(6, 9, 3, stride=2, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 11, 11)
    pair = factors(layer, spectrum_of(layer, None).basis)
    torch.testing.assert_close(pair(x), layer(x), atol=1e-5, rtol=1e-5)
    assert pair.down.kernel_size == (3, 3)
    assert pair.up.kernel_size == (1, 1)


@pytest.mark.parametrize(
    "settings", [{"energy": 0.9}, {"budget": 0.7}, {"rank": 3}, {"rank": 1000}, {"energy": 1.0}]
)
def test_two_factors_only_where_they_are_cheaper(settings: dict[str, Any]) -> None:
    unet = tiny_unet()
    before = sum(parameter.numel() for parameter in unet.parameters())
    sizes = {n: m.weight.numel() for n, m in unet.named_modules() if can_be_low_rank(m)}
    found = make_low_rank(unet, Structure(), LowRank(whiten=False, **settings))
    after = sum(parameter.numel() for parameter in unet.parameters())
    ranks = found.structure.ranks
    if settings in ({"rank": 1000}, {"energy": 1.0}):
        assert not ranks
        assert after == before
        return
    assert ranks
    for name in ranks:
        pair = unet.get_submodule(name)
        assert pair.down.weight.numel() + pair.up.weight.numel() < sizes[name]
    if "budget" in settings:
        assert 0.6 * before < after <= settings["budget"] * before


def test_energy_and_ranks() -> None:
    energies = np.array([4.0, 3.0, 2.0, 1.0])
    assert [rank_for_energy(energies, share) for share in (0.3, 0.4, 0.7, 0.71, 1.0)] == [
        1,
        1,
        2,
        3,
        4,
    ]


def test_a_budget_goes_where_it_is_worth_most() -> None:
    flat = Spectrum(np.ones(10), None, dense=100, per_rank=20)
    steep = Spectrum(0.5 ** np.arange(10.0), None, dense=100, per_rank=20)
    ranks = choose_ranks({"flat": flat, "steep": steep}, LowRank(budget=0.8), total=200)
    assert ranks == {"steep": 3} or ranks["steep"] < ranks.get("flat", 5)
    with pytest.raises(RequestError, match=r"rank 1 everywhere still leaves 20.0%"):
        choose_ranks({"flat": flat, "steep": steep}, LowRank(budget=0.1), total=200)


def test_layers_that_are_named_stay() -> None:
    unet = tiny_unet()
    settings = LowRank(rank=2, whiten=False, keep=("attn", "conv1$"))
    found = make_low_rank(unet, Structure(), settings)
    assert found.structure.ranks
    assert not any("attn" in name or "conv1" in name for name in found.structure.ranks)
    with pytest.raises(RequestError, match="matches no layer"):
        make_low_rank(tiny_unet(), Structure(), LowRank(rank=2, whiten=False, keep=("nothing",)))
    with pytest.raises(RequestError, match="whiten = false"):
        make_low_rank(tiny_unet(), Structure(), LowRank(rank=2))
